"""`diffexpo data` on preference sets and prompt lists, through the entry point."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.cli.main import main
from tests.unit.data.conftest import vote


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def votes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [vote(n, 0.5 if n == 2 else 1.0) for n in range(6)] + [vote(7, jpg_0=b"broken")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "votes.parquet")
    return tmp_path / "votes.parquet"


def test_a_set_is_imported_verified_and_counted(votes, tmp_path, capsys):
    code, out, err = call(capsys, "data", "import", votes, "--to", tmp_path / "set")
    assert code == 0, err
    assert "5 pairs of 7 rows (1 ties, 0 unlabelled, 1 quarantined (not an image))" in out
    assert "votes.parquet:6: not an image" in out
    code, out, _ = call(capsys, "data", "verify", tmp_path / "set")
    assert (code, "2 files are as their manifest says" in out) == (0, True)
    code, out, _ = call(capsys, "data", "stats", tmp_path / "set", "--json")
    assert code == 0 and json.loads(out)["pairs"] == 5 and json.loads(out)["format"] == "diffexpo"
    code, out, _ = call(capsys, "data", "inspect", votes)
    assert code == 0 and "format: pickapic" in out and "the first picture won" in out
    (tmp_path / "set" / "pairs-00000.parquet").write_bytes(b"changed")
    assert call(capsys, "data", "verify", tmp_path / "set")[0] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import", "none.parquet", "--to", "out"], 3, "none.parquet does not exist"),
        (["import", "votes.parquet", "--to", "out", "--format", "pickpic"], 2, "offline.format = 'pickpic'"),
        (
            ["import", "votes.parquet", "--to", "out", "--format", "webdataset"],
            4,
            "not an uncompressed tar file",
        ),
        (["stats", "no-such-run"], 3, "no run 'no-such-run'"),
        (["inspect", "votes.parquet", "some-pair"], 2, "is a preference set, whose pairs have no history"),
        (["verify", "."], 3, "has no manifest.json"),
        (["prompts", "list.tsv", "--to", "x.jsonl"], 2, "its ending does not tell the format"),
        (["prompts", "list.txt", "--to", "x.jsonl", "--split", "train"], 2, "expected NAME=SHARE"),
    ],
)
def test_wrong_calls_end_with_their_code(votes, capsys, arguments, code, message):
    found, _, err = call(capsys, "data", *arguments)
    assert found == code and message in err and "Traceback" not in err


def test_prompts_are_brought_in_split_and_chosen(tmp_path, capsys):
    lines = "".join(f"prompt {n}\tC{n % 2}\tBasic\t\n" for n in range(100)) + "prompt 1\tC1\tBasic\t\n"
    (tmp_path / "PartiPrompts.tsv").write_text("Prompt\tCategory\tChallenge\tNote\n" + lines)
    arguments = [
        "--format",
        "partiprompts",
        "--category",
        "C1",
        "--split",
        "train=0.8",
        "--split",
        "test=0.2",
    ]
    code, out, err = call(
        capsys, "data", "prompts", tmp_path / "PartiPrompts.tsv", "--to", tmp_path / "p.jsonl", *arguments
    )
    assert code == 0, err
    assert "101 read, 1 came twice, 50 chosen" in out
    parts = [(tmp_path / f"p-{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert len(parts[0]) + len(parts[1]) == 50 and len(parts[0]) > len(parts[1])
    assert json.loads(parts[0][0])["category"] == "C1"
