"""`diffexpo cite`, one of the commands on an existing run, through the entry point."""

import re

import pytest

from diffexpo.cli.main import main
from diffexpo.config import config_to_yaml, load_config


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
