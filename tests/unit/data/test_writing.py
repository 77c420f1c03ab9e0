"""A preference set as verified Parquet shards: nothing lost, nothing twice, whatever moment the process dies at."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffexpo.data.export import EXPORT_SCHEMA
from diffexpo.data.offline.formats import detect_format, read_offline
from diffexpo.data.offline.writing import rewrite_pairs, verify_rewritten
from diffexpo.errors import ImportFormatError, MissingError, StoreError

from .conftest import jpeg, vote

Write = Callable[..., Path]


@pytest.fixture
def source(write_votes: Write) -> Path:
    """Forty rows: every seventh a tie, every ninth not decodable."""
    rows = []
    for number in range(40):
        label = 0.5 if number % 7 == 3 else float(number % 2)
        rows.append(vote(number, label, jpg_0=jpeg(number)[:40] if number % 9 == 4 else jpeg(number, 0)))
    return write_votes(rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_are_pickapic_and_read_back_to_the_same_pairs(source: Path, tmp_path: Path) -> None:
    report = rewrite_pairs(source, tmp_path / "out", shard_pairs=10)
    pairs = list(read_offline(source))
    assert report.kept == len(pairs) == 31 and (report.ties, report.quarantined) == (6, {"not an image": 3})
    table = pq.read_table(tmp_path / "out" / "pairs-00000.parquet")
    assert table.column_names[:19] == EXPORT_SCHEMA.names[:19]
    assert table.schema.field("label_0").type == "double" and table.schema.field("jpg_0").type == "binary"
    assert set(table["label_0"].to_pylist()) == {0.0, 1.0}
    assert detect_format(tmp_path / "out") == "diffexpo"
    again = list(read_offline(tmp_path / "out"))
    named = ("caption", "winner_jpg", "loser_jpg", "winner_model", "loser_model", "winner_uid", "loser_uid")
    assert [[getattr(p, n) for n in named] for p in again] == [[getattr(p, n) for n in named] for p in pairs]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [f"votes.parquet:{n}" for n in (4, 13, 22)]
    assert verify_rewritten(tmp_path / "out") == 5


def test_a_second_call_only_reports_and_another_import_is_refused(source: Path, tmp_path: Path) -> None:
    report = rewrite_pairs(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert rewrite_pairs(source, tmp_path / "out") == report and contents(tmp_path / "out") == before
    with pytest.raises(StoreError, match="holds another import: limit, seed differ"):
        rewrite_pairs(source, tmp_path / "out", limit=3, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match=r"is not empty \(thesis.txt"):
        rewrite_pairs(source, tmp_path / "mine")


def test_a_set_without_a_usable_pair_is_an_error_that_names_the_log(
    write_votes: Write, tmp_path: Path
) -> None:
    path = write_votes([vote(n, jpg_0=b"broken") for n in range(3)])
    with pytest.raises(ImportFormatError, match=r"gave no pair: 0 pairs of 3 rows(.|\n)*quarantine.jsonl"):
        rewrite_pairs(path, tmp_path / "out")
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("moment", ["write_table", "close"])
def test_a_full_disk_keeps_whole_shards_and_the_import_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    report = rewrite_pairs(source, tmp_path / "whole", shard_pairs=7)
    opened: list[pq.ParquetWriter] = []
    write = getattr(pq.ParquetWriter, moment)

    def refuse(writer: pq.ParquetWriter, *arguments: object) -> None:
        if writer not in opened:
            opened.append(writer)
        if writer is opened[-1] and len(opened) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, moment, refuse)
        with pytest.raises(
            StoreError, match=r"pairs-00002.parquet: (.|\n)*No space left(.|\n)*repeat the import"
        ):
            rewrite_pairs(source, tmp_path / "out", shard_pairs=7)
    assert len(list((tmp_path / "out").glob("pairs-*.parquet"))) == 2
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert rewrite_pairs(source, tmp_path / "out", shard_pairs=7) == report
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_is_really_full(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "StoreError: could not write" in done.stderr and "File too large" in done.stderr
    assert not list((tmp_path / "out").glob("pairs-*"))


REFUSED = """
import resource, sys
from diffexpo.data.offline import writing
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writing.rewrite_pairs(sys.argv[1], sys.argv[2])
"""


def test_verifying_finds_what_was_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rewrite_pairs(source, out, shard_pairs=10)
    shard = out / "pairs-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match="pairs-00001.parquet has changed"):
        verify_rewritten(out)
    shard.unlink()
    (out / "pairs-00009.parquet").write_bytes(whole)
    with pytest.raises(StoreError, match=r"2 problems(.|\n)*is missing(.|\n)*is not named"):
        verify_rewritten(out)
    (out / "manifest.json").unlink()
    with pytest.raises(MissingError, match="no import, or one that was not finished"):
        verify_rewritten(out)
    with pytest.raises(ImportFormatError, match="an import that was not finished"):
        next(read_offline(out))


KILL = """
import os, signal, sys
from pathlib import Path
from diffexpo.data.offline import writing

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

moment = sys.argv[3]
tick = lambda pairs: None
if moment != "while one is written":
    # nothing is read while a shard is written, so that the moment is the same in every run
    writing.one_ahead = lambda items: items
if moment == "between shards":
    shards = []
    tick = lambda pairs: (shards.append(pairs), len(shards) == 2 and die())
if moment in ("in a shard", "while one is written"):
    row, count = writing._row, []
    writing._row = lambda pair: (count.append(1), len(count) == 15 and die(), row(pair))[-1]
if moment == "before a rename":
    whole = writing.sha256_of
    writing.sha256_of = lambda path: die() if path.name.startswith("pairs-00002") else whole(path)
if moment == "before the manifest":
    writing._entry = die
writing.rewrite_pairs(sys.argv[1], sys.argv[2], shard_pairs=7, tick=tick)
"""


def run_to_its_death(source: Path, out: Path, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(source), str(out), moment],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_kill_while_a_shard_is_written_and_the_next_is_read_leaves_whole_shards(
    source: Path, tmp_path: Path
) -> None:
    report = rewrite_pairs(source, tmp_path / "whole", shard_pairs=7)
    out = tmp_path / "killed"
    run_to_its_death(source, out, "while one is written")
    shards = list(out.glob("pairs-*.parquet"))
    assert len(shards) <= 2 and all(pq.read_metadata(path).num_rows == 7 for path in shards)
    assert rewrite_pairs(source, out, shard_pairs=7) == report
    assert contents(out) == contents(tmp_path / "whole")


def test_kill_9_at_any_moment_loses_nothing_and_repeats_nothing(source: Path, tmp_path: Path) -> None:
    report = rewrite_pairs(source, tmp_path / "whole", shard_pairs=7)
    out = tmp_path / "killed"
    whole_shards = []
    for moment in ("in a shard", "before a rename", "between shards", "before the manifest"):
        run_to_its_death(source, out, moment)
        assert not (out / "manifest.json").exists()
        whole_shards.append(len(list(out.glob("pairs-*.parquet"))))
        # what a dying process may also have written: log lines behind the last whole shard
        with (out / "quarantine.jsonl").open("a") as log:
            log.write('{"row": "half a li')
    assert whole_shards == [2, 2, 4, 5]
    assert rewrite_pairs(source, out, shard_pairs=7) == report
    assert contents(out) == contents(tmp_path / "whole")
    names = [
        name for path in sorted(out.glob("*.parquet")) for name in pq.read_table(path)["pair_id"].to_pylist()
    ]
    assert len(names) == len(set(names)) == 31
