"""Commands on an existing run, through the entry point: `diffexpo cite` and the single stages."""

import json
import re

import pytest

from diffexpo.cli.main import main
from diffexpo.config import config_to_yaml, load_config
from diffexpo.data.store import Store
from tests.world import world

__all__ = ["world"]


def call(capsys, *arguments):
    """Exit code, standard output and standard error of a command in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder that holds nothing but its settings."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(load_config(["emoji/ddpo"], (), {}).config))
    return folder


@pytest.mark.parametrize("name", [("mine",), ("runs/mine",), ()])
def test_lists_what_a_folder_with_settings_only_used(run, capsys, name):
    code, out, err = call(capsys, "cite", *name)
    assert (code, err) == (0, "")
    assert out.startswith(
        "method DDPO: Black et al. (2024). Training Diffusion Models with Reinforcement Learning. "
    )
    assert all(re.match(r"[^:]+.*: .+\.$", line) for line in out.splitlines())
    assert "EXPO" not in out


def test_bibtex_parses_and_says_what_each_entry_is_for(run, capsys):
    code, out, _ = call(capsys, "cite", "mine", "--bibtex")
    keys = re.findall(r"^@[a-z]+\{([^,]+),$", out, re.MULTILINE)
    assert code == 0 and keys[0] == "black2024ddpo" and keys[-1] == "diffexpo"
    assert len(keys) == len(set(keys)) and out.count("{") == out.count("}")
    assert out.startswith("% method DDPO\n@inproceedings{black2024ddpo,")


def test_a_name_that_is_no_run_gives_the_nearest(run, capsys):
    code, _, err = call(capsys, "cite", "mime")
    assert code == 3 and "no run 'mime'" in err and "Did you mean mine?" in err


def test_settings_that_are_none_are_refused(run, capsys):
    (run / "config.yaml").write_text("nonsense: 1\n")
    code, _, err = call(capsys, "cite", "mine")
    assert code == 2 and "nonsense is not a setting" in err and "Traceback" not in err


def test_single_stages_tell_what_they_did_as_json(world, tmp_path, capsys):
    """Each is the next one of its kind, with the numbers of its manifest; nothing else is printed."""
    folder = tmp_path / "stages"
    folder.mkdir()
    small = [
        "algorithm.type=d3po",
        "offline.source=null",
        "explore.iterations=1",
        "training.steps=1",
        "evaluation.num_prompts=1",
    ]
    loaded = load_config([str(world / "recipe.yaml")], small, {})
    (folder / "config.yaml").write_text(config_to_yaml(loaded.config))
    for stage in ("collect", "pair", "train"):
        code, out, err = call(capsys, stage, str(folder), "--json")
        assert code == 0, err
        numbers = Store(folder / "store").manifest(stage, 1)
        assert numbers
        assert json.loads(out) == {
            "folder": str(folder),
            "stage": stage,
            "iteration": 1,
            "numbers": numbers,
        }
    told = {"folder": str(folder), "stage": "train", "iteration": None, "numbers": {}}
    assert json.loads(call(capsys, "train", str(folder), "--json")[1]) == told
    # An evaluation is a folder and no row of the store.
    for iteration in (1, None):
        out = call(capsys, "evaluate", str(folder), "--json")[1]
        assert json.loads(out) == told | {"stage": "evaluate", "iteration": iteration}
        assert (folder / "eval" / "iteration-1").is_dir()
