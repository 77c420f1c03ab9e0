"""Commands, messages and exit codes, through the entry point."""

import json
import os
import subprocess
import sys

import pytest
import typer
import yaml

from diffexpo.cli.failures import boundary
from diffexpo.cli.folders import find_run, free_folder
from diffexpo.cli.main import app, main
from diffexpo.cli.run import deadline
from diffexpo.config import RunConfig, config_to_yaml, list_recipes, load_config
from diffexpo.errors import Interrupted, MissingError, RewardError


def call(capsys, *arguments):
    """Exit code, standard output and standard error of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(folder, name, state="interrupted", age=0):
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config_to_yaml(RunConfig()))
    (run / "status.json").write_text(json.dumps({"state": state}))
    for path in run.iterdir():
        os.utime(path, (1e9 - age, 1e9 - age))
    return run


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            ["config", "show", "emoji/expo", "--set", "training.nonsense_xyz=1"],
            2,
            "training.nonsense_xyz is not a setting",
        ),
        (
            ["config", "show", "emoji/expo", "--set", "training.learning_rat=1"],
            2,
            "Did you mean training.learning_rate?",
        ),
        (["run", "emoji/expo", "--dry-run", "--set", "training.steps=abc"], 2, "expected an integer >= 1"),
        (["run", "emoji/exop"], 3, "Did you mean emoji/expo"),
        (["report", "no-such-run"], 3, "no run 'no-such-run'"),
    ],
)
def test_exit_codes_of_the_installed_command(arguments, code, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffexpo", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["run", "emoji/expo", "--nonsense"], ["data", "inspect"], ["run"]]
)
def test_wrong_usage_is_exit_2(arguments, capsys, folder):
    assert call(capsys, *arguments)[0] == 2


def test_version(capsys):
    from diffexpo import __version__

    assert call(capsys, "--version")[:2] == (0, f"{__version__}\n")


def test_config_show_prints_yaml_that_loads_to_the_same(capsys, tmp_path):
    code, out, _ = call(capsys, "config", "show", "emoji/expo", "--set", "seed=4")
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert code == 0
    assert load_config([path], [], {}).config == load_config(["emoji/expo"], ["seed=4"], {}).config


def test_config_show_sources_is_still_the_same_yaml(capsys):
    plain = call(capsys, "config", "show", "emoji/expo")[1]
    annotated = call(capsys, "config", "show", "emoji/expo", "--sources", "--set", "seed=0")[1]
    assert yaml.safe_load(plain) == yaml.safe_load(annotated)
    assert "seed: 0  # --set seed=0" in annotated
    assert "beta: 1000.0  # recipe emoji/expo" in annotated


def test_config_schema_and_fields(capsys):
    assert json.loads(call(capsys, "config", "schema")[1])["additionalProperties"] is False
    out = call(capsys, "config", "fields", "training")[1]
    assert "training.learning_rate: a number > 0 (default 5.12e-06)" in out
    assert "explore" not in out
    assert "Did you mean training" in call(capsys, "config", "fields", "trainin")[2]


def test_recipes_lists_and_shows_what_is_written(capsys):
    assert "emoji/expo " in call(capsys, "recipes")[1]
    out = call(capsys, "recipes", "show", "emoji/expo")[1]
    assert out.startswith("# EXPO-II")
    assert yaml.safe_load(out)["name"] == "expo"


def test_resume_takes_the_most_recent_run(folder):
    make_run(folder, "old", age=100)
    newest = make_run(folder, "new")
    assert find_run(None).resolve() == newest
    assert find_run("old") == find_run(str(folder / "runs" / "old")).relative_to(folder)


def test_a_missing_run_names_the_nearest(folder):
    make_run(folder, "expo-2")
    with pytest.raises(MissingError, match="Did you mean expo-2"):
        find_run("expo-3")


def test_resuming_a_finished_run_says_so(folder, capsys):
    run = make_run(folder, "done", state="finished")
    (run / "report.html").write_text("<html>")
    (run / "export").mkdir()
    (run / "export" / "README.md").touch()
    code, out, _ = call(capsys, "run", "--resume", "done")
    assert code == 0
    assert "complete; nothing to resume" in out
    assert "report: runs/done/report.html" in out


def test_resume_keeps_its_settings(folder, capsys):
    make_run(folder, "a")
    code, _, err = call(capsys, "run", "--resume", "a", "--set", "seed=1")
    assert (code, "results depend on it" in err) == (2, True)
    assert call(capsys, "run", "--resume", "a", "b")[0] == 2


def test_new_runs_get_a_free_name(folder):
    assert str(free_folder("expo")) == "runs/expo"
    make_run(folder, "expo")
    make_run(folder, "expo-2")
    assert str(free_folder("expo")) == "runs/expo-3"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RewardError("constant"), 4),
        (Interrupted("stopped"), 75),
        (KeyboardInterrupt(), 75),
        (ZeroDivisionError("x"), 4),
    ],
)
def test_the_boundary_turns_errors_into_exit_codes_and_keeps_them_in_the_log(error, code, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as caught, boundary(tmp_path):
        raise error
    err = capsys.readouterr().err
    log = (tmp_path / "log.txt").read_text()
    assert caught.value.code == code
    assert "Traceback" not in err
    assert ("Traceback" in log) == isinstance(error, ZeroDivisionError)
    assert (f"diffexpo run --resume {tmp_path}" in err) == (code == 75)
    assert (f"diffexpo run --resume {tmp_path}" in log) == (code == 75)


def test_a_run_that_was_stopped_before_it_began_is_not_said_to_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, boundary(tmp_path / "early"):
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert caught.value.code == 75 and "--resume" not in err and "same command" in err


def test_recipes_are_whole_words_at_any_width_and_the_first_look_comes_first(capsys, monkeypatch):
    for width in ("80", "40"):
        monkeypatch.setenv("COLUMNS", width)
        _, out, _ = call(capsys, "recipes")
        lines = out.splitlines()
        assert lines[1].split()[0] == "scenes/quick"
        words = {word for line in lines for word in line.split()}
        assert {word for recipe in list_recipes() for word in recipe.summary.split()} <= words
        assert all(len(line) <= int(width) for line in lines[:-1] if " " in line.strip())
    names = [one["name"] for one in json.loads(call(capsys, "recipes", "--json")[1])]
    assert sorted(names) == sorted(recipe.name for recipe in list_recipes())


def test_a_recipe_is_shown_as_it_is_written_and_as_json(capsys, folder):
    (folder / "mine.yaml").write_text("# Mine.\nname: mine\ntraining: {learning_rate: 1e-5}  # slow\n")
    assert call(capsys, "recipes", "show", "mine.yaml")[1] == (folder / "mine.yaml").read_text()
    code, out, _ = call(capsys, "recipes", "show", "mine.yaml", "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "name": "mine.yaml",
            "what": "Mine.",
            "file": "mine.yaml",
            "settings": {"name": "mine", "training": {"learning_rate": 1e-5}},
        },
    )
    known = {one["name"]: one for one in json.loads(call(capsys, "recipes", "--json")[1])}
    shown = json.loads(call(capsys, "recipes", "show", "emoji/expo", "--json")[1])
    assert {name: shown[name] for name in known["emoji/expo"]} == known["emoji/expo"]
    assert call(capsys, "recipes", "show", "emoji/exop", "--json")[0] == 3


def test_a_deadline_interrupts_like_ctrl_c():
    import signal
    import time

    # A shell that starts its children in the background has them ignore Ctrl-C; a run installs its own handler.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), deadline(0.05 / 60):
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_env_names_the_versions(capsys):
    code, out, _ = call(capsys, "env")
    assert code == 0
    assert "torch 2" in out
    assert "python 3" in out


def test_doctor_checks_are_json(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    checks = json.loads(out)
    assert {check["state"] for check in checks} <= {"ok", "warn", "fail"}
    assert (code == 4) == any(check["state"] == "fail" for check in checks)
    assert any("torchvision" in check["what"] for check in checks)


NO_RESULTS = {"config schema", "label serve", "rewards serve", "study serve"}
"""What prints JSON anyway, and what serves until it is stopped."""


def commands(group, path=()):
    """Every command of the tree as (name, options)."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            options = {option for parameter in command.params for option in parameter.opts}
            yield " ".join((*path, name)), options


def test_every_command_that_prints_results_prints_json():
    found = dict(commands(typer.main.get_command(app)))
    assert {name for name, options in found.items() if "--json" not in options} == NO_RESULTS
    assert len(found) > 40


def test_the_votes_that_certainty_takes_are_json(capsys):
    rows = json.loads(call(capsys, "label", "cost", "--candidates", "3", "--json")[1])
    assert rows[0] == {"asked of a prompt": "one pair", "votes": "1", "how sure": "75.0% right"}
