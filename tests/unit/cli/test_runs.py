"""`diffexpo runs` lists what is there, finished or not."""

import json

import pytest

from diffexpo.cli.main import main
from diffexpo.config import config_to_yaml, load_config


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def make(folder, name, state, summary=None):
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config_to_yaml(load_config(["scenes/quick"], ["seed=4"], {}).config))
    (run / "status.json").write_text(json.dumps({"state": state}))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))


def test_runs_are_listed_with_state_result_and_interval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    win = {"rate": [0.62, 0.55, 0.69]}
    alarms = [{"name": "x", "severity": "warning"}, {"name": "y", "severity": "note"}]
    done = {"seed": 4, "method": "expo", "result": "iteration-2", "win_rate": {"iteration-2": win}}
    make(tmp_path, "one", "finished", done | {"alarms": alarms, "state": "running"})
    make(tmp_path, "two", "interrupted")
    (tmp_path / "runs" / "given").mkdir()
    code, out, _ = call(capsys, "runs")
    lines = {line.split()[0]: line for line in out.splitlines()[3:]}
    assert code == 0 and list(lines) == ["one", "two"]
    assert (
        "finished" in lines["one"]
        and "62.0% (55.0% to 69.0%)" in lines["one"]
        and lines["one"].endswith(" 1")
    )
    assert "interrupted" in lines["two"] and "expo" in lines["two"] and lines["two"].split()[3] == "4"
    found = json.loads(call(capsys, "runs", "--json")[1])
    assert [run["run"] for run in found] == ["one", "two"]
    assert found[0]["state"] == "finished" and found[0]["win_rate"]["iteration-2"] == win


def test_no_folder_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "runs")
    assert code == 3 and "there is no folder runs" in err
