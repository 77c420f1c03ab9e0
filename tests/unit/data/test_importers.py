"""Every format of preference sets: the right picture wins, what is dropped is counted, a reading can go on."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.hostile_inputs import BUILDERS, good_rows
from diffexpo.config.schema import OfflineConfig
from diffexpo.data.offline.formats import AUTO, OFFLINE, detect_format, read_offline
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.offline.summary import inspect_offline, summarise_offline
from diffexpo.data.offline.votes import ImportReport, OfflinePair, verdict_of_record
from diffexpo.data.prompt_lists import read_prompt_list
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, ImportFormatError, Interrupted, MissingError

from .conftest import LetterPolicy, jpeg, vote


def read(path: Path, **options: object) -> tuple[list[OfflinePair], ImportReport]:
    report = ImportReport()
    return list(read_offline(path, report, **options)), report


def put(folder: Path, names: Sequence[str]) -> None:
    """A picture of each name below a folder; its content depends on the name alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(name))


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


# ---- all formats alike -------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_format_is_recognised_and_gives_the_same_pairs(builder: str, tmp_path: Path) -> None:
    rows = good_rows(random.Random(1))
    form, build = BUILDERS[builder]
    path = build(tmp_path / "set", rows)
    assert detect_format(path) == form
    pairs, report = read(path)
    found = {pair.caption: (pair.winner_jpg, pair.loser_jpg) for pair in pairs}
    assert found == {str(row.caption): row.pictures for row in rows}
    assert (report.read, report.kept, report.quarantined) == (6, 6, {})
    assert len({pair.row for pair in pairs}) == 6


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_reading_goes_on_behind_the_rows_that_were_read(builder: str, tmp_path: Path) -> None:
    rows = good_rows(random.Random(2))
    rows[1] = replace(rows[1], pictures=(b"no picture", rows[1].pictures[1]))
    build = BUILDERS[builder][1]
    path = build(tmp_path / "set", rows)
    whole, report = read(path)
    assert report.quarantined == {"not an image": 1} and report.read == 6
    for start in range(7):
        head = ImportReport()
        stream = read_offline(path, head)
        kept = []
        while head.read < start:
            kept.append(next(stream))
        again = ImportReport(**head.to_json())
        kept += list(read_offline(path, again))
        assert kept == whole and again == report


def test_the_setting_names_exactly_the_formats() -> None:
    assert set(get_args(OfflineConfig.model_fields["format"].annotation)) == {AUTO, *OFFLINE}


def test_what_no_importer_knows_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImportFormatError, match=r"looks like no preference set(.|\n)*hpdv2 +HPDv2"):
        next(read_offline(tmp_path))
    with pytest.raises(MissingError, match="does not exist"):
        next(read_offline(tmp_path / "none"))
    with pytest.raises(ConfigError, match="offline.format = 'nonsense': expected auto or one of"):
        next(read_offline(tmp_path, format="nonsense"))
    Store(tmp_path / "store")
    with pytest.raises(ImportFormatError, match="holds latents, not images; export its pairs first"):
        next(read_offline(tmp_path / "store"))


def test_equal_file_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.Table.from_pylist([vote(number)]), tmp_path / folder / "train.parquet")
    pairs, _ = read(tmp_path)
    assert [pair.row for pair in pairs] == ["a/train.parquet:0", "b/train.parquet:0"]


# ---- Pick-a-Pic and our own --------------------------------------------------------------------------------


def test_rows_that_contradict_themselves_are_quarantined(write_votes: Callable[..., Path]) -> None:
    rows = [
        vote(0, best_image_uid="uid 0 0"),
        vote(1, best_image_uid="uid 1 1"),
        vote(2, image_0_uid="same", image_1_uid="same"),
        vote(3, 0.5, best_image_uid="uid 3 1"),
        vote(4, caption="x" * 20_001),
        vote(5, caption="a\0b"),
    ]
    pairs, report = read(write_votes(rows))
    assert [pair.caption for pair in pairs] == ["prompt 0"] and report.ties == 1
    assert report.quarantined == {
        "best_image_uid names the loser": 1, "two images under one uid": 1,
        "caption longer than 20,000 characters": 1, "caption holds zero bytes": 1,
    }  # fmt: skip


def test_a_row_group_that_does_not_decode_is_counted_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "votes.parquet"
    table = pa.Table.from_pylist([vote(n) for n in range(9)])
    pq.write_table(table, path, row_group_size=3, write_page_checksum=True, use_dictionary=False)
    second = pq.read_metadata(path).row_group(1)
    columns = {second.column(i).path_in_schema: second.column(i) for i in range(second.num_columns)}
    data = bytearray(path.read_bytes())
    data[columns["jpg_0"].data_page_offset + columns["jpg_0"].total_compressed_size - 20] ^= 255
    path.write_bytes(bytes(data))
    pairs, report = read(path)
    assert [pair.caption for pair in pairs] == [f"prompt {n}" for n in (0, 1, 2, 6, 7, 8)]
    assert report.quarantined == {"damaged Parquet: these rows do not decode": 3} and report.read == 9


def test_a_newer_version_of_our_own_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    rows = [vote(0, pair_id="p", schema_version=1), vote(1, pair_id="q", schema_version=1)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert detect_format(path) == "diffexpo" and len(read(path)[0]) == 2
    pq.write_table(pa.Table.from_pylist([row | {"schema_version": 99} for row in rows]), path)
    with pytest.raises(ImportFormatError, match="schema_version 99, this version reads 1"):
        read(path)


# ---- rankings ----------------------------------------------------------------------------------------------


def test_a_ranking_becomes_every_pair_of_different_rank(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    put(tmp_path / "test", names)
    entry = {
        "prompt": "a cat",
        "image_path": names,
        "rank": [2, 1, 2],
        "raw_annotations": [{"rank": [1, 2, 3]}],
    }
    pairs, report = read(write_json(tmp_path / "test.json", [entry]))
    assert [(pair.row, pair.winner_uid, pair.loser_uid) for pair in pairs] == [
        ("test.json:0/0-1", "b.jpg", "a.jpg"),
        ("test.json:0/1-2", "b.jpg", "c.jpg"),
    ]
    assert (report.read, report.ties) == (3, 1)
    assert pairs[0].winner_jpg == jpeg("b.jpg") and pairs[1].loser_jpg == jpeg("c.jpg")


def test_hpdv2_prefers_the_one_not_the_first(tmp_path: Path) -> None:
    put(tmp_path / "train", ["a.jpg", "b.jpg"])
    entries = [
        {"prompt": "a cat", "human_preference": choice, "file_path": ["a.jpg", "b.jpg"]}
        for choice in ([0, 1], [1, 0])
    ]
    write_json(tmp_path / "train.json", entries)
    write_json(tmp_path / "test.json", [])
    pairs, _ = read(tmp_path)
    assert [pair.winner_uid for pair in pairs] == ["b.jpg", "a.jpg"]
    assert detect_format(tmp_path) == "hpdv2"


def test_a_folder_of_several_lists_wants_one_named(tmp_path: Path) -> None:
    for name in ("all.json", "test.json"):
        write_json(tmp_path / name, [{"prompt": "a", "path1": "x.jpg", "path2": "y.jpg"}])
    with pytest.raises(MissingError, match="holds all.json, test.json, not train.json; name the file"):
        read(tmp_path, format="hpdv3")
    assert detect_format(tmp_path / "test.json") == "hpdv3"


def test_hpdv3_names_the_winner_first_and_keeps_the_confidence(tmp_path: Path) -> None:
    put(tmp_path, ["images/x.jpg", "images/y.jpg"])
    entry = {
        "prompt": "a cat", "path1": "images/y.jpg", "path2": "images/x.jpg", "choice_dist": [8, 1], "confidence": 0.97,
        "model1": "one", "model2": "two",
    }  # fmt: skip
    other = entry | {"confidence": None, "path2": "images/gone.jpg"}
    pairs, report = read(write_json(tmp_path / "train.json", [entry, other]))
    (pair,) = pairs
    assert pair.winner_jpg == jpeg("images/y.jpg") and (pair.winner_model, pair.loser_model) == ("one", "two")
    assert pair.confidence == 0.97 and report.quarantined == {"picture is missing": 1}


def test_imagerewarddb_rows_need_not_be_neighbours(tmp_path: Path) -> None:
    rows = [("p", 2), ("q", 1), ("p", 1), ("q", 2), ("p", 3), ("alone", 1)]
    names = [f"images/train/train_1/{number}.webp" for number in range(len(rows))]
    put(tmp_path, names)
    table = pa.table(
        {
            "image_path": names,
            "prompt_id": [prompt for prompt, _ in rows],
            "prompt": [f"prompt {prompt}" for prompt, _ in rows],
            "rank": [rank for _, rank in rows],
        }
    )
    pq.write_table(table, tmp_path / "metadata-train.parquet")
    pairs, report = read(tmp_path)
    orders = {
        (pair.caption, Path(str(pair.winner_uid)).stem, Path(str(pair.loser_uid)).stem) for pair in pairs
    }
    assert orders == {
        ("prompt p", "2", "0"),
        ("prompt p", "0", "4"),
        ("prompt p", "2", "4"),
        ("prompt q", "1", "3"),
    }
    assert report.quarantined == {"the only picture of its prompt": 1}


def test_imagerewarddb_json_of_a_folder_and_of_the_benchmark(tmp_path: Path) -> None:
    put(tmp_path, ["1.webp", "2.webp", "3.webp"])
    rows = [
        {"image_path": f"images/train/train_1/{n}.webp", "prompt_id": "p", "prompt": "a cat", "rank": n}
        for n in (2, 1)
    ]
    pairs, _ = read(write_json(tmp_path / "train_1.json", rows), format="imagerewarddb")
    assert [pair.winner_jpg for pair in pairs] == [jpeg("1.webp")]
    ranked = {
        "id": "x",
        "prompt": "a cat",
        "generations": ["1.webp", "2.webp", "3.webp"],
        "ranking": [3, 3, 1],
    }
    pairs, report = read(write_json(tmp_path / "test.json", [ranked]))
    assert [pair.winner_uid for pair in pairs] == ["3.webp", "3.webp"] and report.ties == 1


# ---- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        ({"preferred": 0}, "0"),
        ({"preferred": "1"}, "1"),
        ({"preferred": 1.0}, "1"),
        ({"preferred": "tie"}, "tie"),
        ({"preferred": ""}, "unlabelled"),
        ({"preferred": True}, "preferred is not 0, 1 or tie"),
        ({"preferred": 2}, "preferred is not 0, 1 or tie"),
        ({"label": "image_1"}, "1"),
        ({"label": "tie"}, "tie"),
        (
            {"label": 1},
            "label is not image_0, image_1 or tie; put the better picture's number in `preferred`",
        ),
        ({"label_0": "1", "label_1": "0"}, "0"),
        ({"label_0": 0.5, "label_1": 0.5}, "tie"),
        ({"label_0": None, "label_1": None}, "unlabelled"),
        ({"label_0": float("nan"), "label_1": 0}, "labels are not 1/0, 0/1 or 0.5/0.5"),
        ({"label_0": 1, "label_1": 1}, "labels are not 1/0, 0/1 or 0.5/0.5"),
        ({}, "unlabelled"),
    ],
)
def test_who_won_is_never_guessed(record: dict[str, object], verdict: str) -> None:
    assert verdict_of_record(record) == verdict


def test_a_table_names_pictures_below_its_folder(tmp_path: Path) -> None:
    put(tmp_path, ["x/a.jpg", "x/b.jpg"])
    lines = [
        "prompt,image_0,image_1,preferred",
        "a cat,x/a.jpg,x/b.jpg,1",
        '"a, b",x/a.jpg,x/b.jpg,tie',
        "c,x/a.jpg",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    pairs, report = read(tmp_path)
    assert [(pair.caption, pair.winner_jpg) for pair in pairs] == [("a cat", jpeg("x/b.jpg"))]
    assert report.ties == 1 and report.quarantined == {"not one cell a column": 1}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("promt,winner,loser", "column 'prompt' is missing; the nearest present one is 'promt'"),
        (
            "prompt,image_0,image1,preferred",
            "column 'image_1' is missing; the nearest present one is 'image1'",
        ),
        ("prompt,image_0,image_1,prefered", "no column says who won; the nearest present one is 'prefered'"),
        ("prompt,winner,winner", "column 'winner' is there twice"),
    ],
)
def test_a_missing_table_column_is_named_with_the_nearest(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "pairs.csv").write_text(f"{header}\na,b,c,0\n")
    with pytest.raises(ImportFormatError, match=message):
        read(tmp_path / "pairs.csv")


# ---- folders and archives ----------------------------------------------------------------------------------


def test_pictures_without_a_prompt_and_names_without_a_picture_are_counted(tmp_path: Path) -> None:
    put(tmp_path, ["winners/a.jpg", "losers/a.png", "winners/b.jpg", "winners/c.webp", "losers/c.jpg"])
    (tmp_path / "prompts.csv").write_text("name,prompt\na,a cat\nb,a dog\n")
    pairs, report = read(tmp_path)
    assert [(pair.row, pair.caption, pair.loser_jpg) for pair in pairs] == [
        ("prompts.csv:0", "a cat", jpeg("losers/a.png"))
    ]
    assert report.quarantined == {"no loser picture": 1, "no prompt": 2}


def test_tar_members_are_grouped_by_key(tmp_path: Path) -> None:
    members = [
        ("s/1.0.jpg", jpeg(1)), ("s/1.1.jpg", jpeg(2)), ("s/1.json", json.dumps({"prompt": "a cat", "preferred": 1}).encode()),
        ("s/2.txt", b"a dog"), ("s/2.loser.png", jpeg(3)), ("s/2.winner.webp", jpeg(4)), ("s/2.more.bin", b"x" * 9),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        folder = tarfile.TarInfo("s")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    pairs, report = read(tmp_path)
    assert [(pair.row, pair.caption, pair.winner_jpg) for pair in pairs] == [
        ("pairs.tar:s/1", "a cat", jpeg(2)),
        ("pairs.tar:s/2", "a dog", jpeg(4)),
    ]
    assert report.read == 2 and report.quarantined == {}


# ---- into a store ------------------------------------------------------------------------------------------


def test_another_format_is_encoded_and_its_quarantine_written(tmp_path: Path, policy: LetterPolicy) -> None:
    put(tmp_path / "set", [f"images/{n}.jpg" for n in range(8)])
    (tmp_path / "set/images/3.jpg").write_bytes(jpeg(3)[:60])
    entries = [
        {
            "prompt": f"prompt {n}",
            "human_preference": [1, 0],
            "file_path": [f"images/{n}.jpg", f"images/{n + 1}.jpg"],
        }
        for n in range(7)
    ]
    write_json(
        tmp_path / "set/train.json", [*entries, {"prompt": "", "human_preference": [1, 0], "file_path": []}]
    )
    stores = [Store(tmp_path / name) for name in ("whole", "broken")]
    report = import_offline(tmp_path / "set", policy, stores[0], unit_pairs=2)
    lines = [json.loads(line) for line in (stores[0].root / "quarantine.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {"train.json:2", "train.json:3", "train.json:7"}
    assert sum(line["rows"] for line in lines) == sum(report.quarantined.values()) == 3 and report.kept == 5

    def die() -> None:
        raise Interrupted("a signal arrived")

    with pytest.raises(Interrupted):
        import_offline(tmp_path / "set", policy, stores[1], unit_pairs=2, tick=die)
    assert not (stores[1].root / "quarantine.jsonl").exists()
    assert import_offline(tmp_path / "set", policy, Store(stores[1].root), unit_pairs=2) == report
    whole, broken = [{p.name: p.read_bytes() for p in store.root.rglob("*.*")} for store in stores]
    assert whole == broken


# ---- summaries ---------------------------------------------------------------------------------------------


def test_a_summary_counts_what_is_there(write_votes: Callable[..., Path]) -> None:
    same = vote(1)
    swapped = vote(1, 0.0)
    path = write_votes([same, same, swapped, vote(2, 0.5), vote(3, jpg_0=b"x"), vote(4, caption="prompt 1")])
    found = summarise_offline(path)
    assert (found["rows"], found["pairs"], found["ties"], found["quarantined"]) == (
        6,
        4,
        1,
        {"not an image": 1},
    )
    assert (found["prompts"], found["same pair again"], found["contradicting pairs"]) == (1, 1, 1)
    assert found["most pairs of one prompt"] == 4 and found["picture sizes"] == {"8x8": 8}
    assert found["winner models"] == {"one": 3, "two": 1}
    seen = inspect_offline(path, rows=2)
    assert (seen["format"], seen["files"], len(seen["first rows"])) == ("pickapic", 1, 2)


@pytest.mark.parametrize("name", [".git", ".ipynb_checkpoints", "__MACOSX"])
def test_a_folder_of_pairs_is_known_whatever_hidden_folders_lie_in_it(tmp_path: Path, name: str) -> None:
    for pair in ("one", "two"):
        (tmp_path / pair).mkdir()
        for role, colour in (("winner", "red"), ("loser", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / pair / f"{role}.png")
        (tmp_path / pair / "prompt.txt").write_text("a cat")
    (tmp_path / name).mkdir()
    (tmp_path / name / "HEAD").write_text("x")
    assert detect_format(tmp_path) == "folders"
    assert len(list(read_offline(tmp_path))) == 2


@pytest.mark.parametrize("builder", BUILDERS)
def test_what_programs_leave_beside_a_set_is_no_part_of_it(builder: str, tmp_path: Path) -> None:
    rows = good_rows(random.Random(1))
    form, build = BUILDERS[builder]
    path = build(tmp_path / "set", rows)
    root = path if path.is_dir() else path.parent
    for file in [file for file in root.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"not what its name says")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(root, root / name, ignore=shutil.ignore_patterns(".ipynb*", "__MAC*"))
    assert detect_format(path) == form
    pairs, report = read(path)
    assert (len(pairs), report.read, report.quarantined) == (6, 6, {})


def test_a_tar_made_on_a_mac_holds_the_same_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a.winner.jpg", "a.loser.jpg", "a.txt"):
            for member, data in ((f"./._{name}", b"Mac OS X"), (f"./{name}", jpeg(name))):
                content = b"a cat" if member == "./a.txt" else data
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    pairs, report = read(tmp_path)
    assert (len(pairs), report.read, report.quarantined) == (1, 1, {})


def test_names_and_ids_mean_the_same_as_numbers_and_as_texts(tmp_path: Path) -> None:
    put(tmp_path / "set", ["winners/7.jpg", "losers/7.jpg"])
    (tmp_path / "set" / "prompts.jsonl").write_text('{"name": 7, "prompt": "a cat"}\n')
    assert [pair.caption for pair in read(tmp_path / "set")[0]] == ["a cat"]
    listed = write_json(tmp_path / "benchmark.json", [{"id": 7, "prompt": "a"}, {"id": "8", "prompt": "b"}])
    assert [prompt.id for prompt in read_prompt_list(listed, "imagereward")[0]] == ["7", "8"]


@pytest.mark.parametrize("one", [1, 1.0, "1"])
def test_preferences_of_hpdv2_may_be_of_any_type(tmp_path: Path, one: object) -> None:
    put(tmp_path / "train", ["a.jpg", "b.jpg"])
    row = {"prompt": "a", "human_preference": [0, one], "file_path": ["a.jpg", "b.jpg"]}
    write_json(tmp_path / "train.json", [row])
    (pair,) = read(tmp_path)[0]
    assert pair.winner_jpg == jpeg("b.jpg")
