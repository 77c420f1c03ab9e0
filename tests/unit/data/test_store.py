"""The store keeps what it is given bit for bit, says when something is wrong, and survives being killed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffexpo.data.store import Store
from diffexpo.errors import MissingError, StoreError
from tests.rows import latent_list, latents_of, pair_row, sample_row

from .conftest import fill


def test_latents_come_back_bit_for_bit(tmp_path: Path) -> None:
    odd = np.array(
        [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, np.float32(1) / 3, 3.4e38], np.float32
    ).reshape(2, 2, 2)
    with np.errstate(over="ignore"):
        half = odd.astype(np.float16)
    view = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    arrays = {"odd": odd, "view": view, "half": half}
    store = Store(tmp_path)
    store.append_unit(3, 0, 0, [sample_row(name) for name in arrays], list(arrays.values()))
    for name, array in arrays.items():
        read = Store(tmp_path).latent(name)
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


def test_latents_follow_the_order_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 9)
    ids = ["1l8", "1w0", "1l8", "1w5"]
    np.testing.assert_array_equal(store.latents(ids), np.stack([latents_of([i])[i] for i in ids]))


def test_torch_latents_of_a_unit_are_taken_row_by_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    store.append_unit(1, 0, 0, [sample_row(name) for name in "abc"], latents)
    np.testing.assert_array_equal(store.latents(["c", "a"]), latents[[2, 0]].numpy())


def test_rows_come_back_equal(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = sample_row(
        "s", unit=2, group=5, negative_prompt=None, seed_key='[0, 1, "collect"]', batch_size=4, batch_position=3,
        sampler='{"name": "ddim"}', rewards={"judge": 0.25, "jpeg": -3}, model="m", improved_from="r",
        height=832, width=1216,
    )  # fmt: skip
    store.append_unit(7, 1, 2, [row], latent_list(["s"]))
    expected = replace(row, iteration=7, latent_file="latents-0007-r01-u0002.safetensors")
    assert store.sample("s") == expected
    assert store.collected(7) == [expected]


def test_a_failed_reward_stays_nan(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_unit(1, 0, 0, [sample_row("s", rewards={"judge": float("nan")})], latent_list(["s"]))
    assert np.isnan(store.sample("s").rewards["judge"])


def test_readers_see_complete_stages_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 2)
    fill(store, 2, 2, complete=False)
    assert {row.iteration for row in store.samples()} == {1} == {row.iteration for row in store.pairs()}
    assert len(store.collected(2)) == 4 and store.samples(9) == []
    with pytest.raises(StoreError, match=r"collect 2 is not complete.*collect-0002.json is missing"):
        store.samples(2)
    with pytest.raises(StoreError, match=r"pair 2 is not complete"):
        store.pairs(2)
    with pytest.raises(StoreError, match="train 1 is not complete"):
        store.manifest("train", 1)


def test_the_number_of_processes_does_not_change_what_is_read(tmp_path: Path) -> None:
    one, three = Store(tmp_path / "one"), Store(tmp_path / "three")
    writers = [Store(tmp_path / "three") for _ in range(3)]
    for unit in (4, 2, 0, 3, 1):
        rows = [sample_row(f"{unit}-{k}") for k in range(3)]
        latents = latents_of([row.sample_id for row in rows])
        one.append_unit(1, 0, unit, rows, list(latents.values()))
        writers[unit % 3].append_unit(1, unit % 3, unit, rows, list(latents.values()))
    for store in (one, three):
        store.write_manifest("collect", 1, {})
    names = [[row.sample_id for row in store.samples(1)] for store in (one, three)]
    assert names[0] == names[1] == [f"{unit}-{k}" for unit in range(5) for k in range(3)]
    assert all(three.unit_done(1, unit) for unit in range(5)) and not three.unit_done(1, 5)


def test_what_another_process_wrote_is_found(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path), Store(tmp_path)
    mine.append_unit(1, 0, 0, [sample_row("a")], latent_list(["a"]))
    theirs.append_unit(1, 1, 1, [sample_row("b")], latent_list(["b"]))
    mine.append_pairs(1, 0, [pair_row("p", "a", "b")])
    with pytest.raises(StoreError, match="sample 'b' is in the store already"):
        mine.append_unit(2, 0, 0, [sample_row("b")], latent_list(["b"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 5}, r"column 'prompt' is 5 \(int\); it must hold a string"),
        ({"prompt": None}, r"column 'prompt' is missing"),
        ({"model": "\ud83d"}, "column 'model' is"),
        ({"batch_size": "4"}, r"column 'batch_size' is '4' \(str\); it must hold an integer"),
        ({"batch_size": True}, "column 'batch_size' is True"),
        ({"batch_size": 2**63}, "column 'batch_size'"),
        ({"rewards": 0.5}, "column 'rewards' is 0.5"),
        ({"rewards": {"judge": "high"}}, "column 'rewards' maps 'judge' to 'high'"),
        ({"sampler": "{not json"}, "column 'sampler' is '{not json'; it must hold JSON"),
        ({"iteration": 4}, "column 'iteration' is 4 in a shard of 1"),
    ],
)
def test_a_wrong_sample_row_is_refused_whole(tmp_path: Path, change: dict[str, object], message: str) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match=message):
        store.append_unit(
            1, 0, 0, [sample_row("good"), sample_row("bad", **change)], latent_list(["good", "bad"])
        )
    assert store.collected(1) == [] and not store.unit_done(1, 0)


def test_what_is_no_row_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(
        StoreError, match=r"row 0 is {'sample_id': 'a'} \(dict\); samples are rows of .*Sample"
    ):
        store.append_unit(1, 0, 0, [{"sample_id": "a"}], np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(StoreError, match=r"\(Sample\); pairs are rows of .*Pair"):
        store.append_pairs(1, 0, [sample_row("a")])


@dataclass(frozen=True)
class Names:
    """A view."""

    loser_id: str
    pair_id: str


def test_a_view_reads_its_columns_only_of_one_source_or_of_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 2)
    store.append_pairs(1, 0, [pair_row("p", "1w0", "1l1", source="human")], stage="label")
    store.write_manifest("label", 1, {})
    assert store.pairs(source="human", view=Names) == [Names("1l1", "p")]
    assert {pair.pair_id for pair in store.pairs(view=Names)} == {"p", "pair 1 0", "pair 1 1"}
    assert store.pairs(7, view=Names) == store.pairs(source="offline") == []
    with pytest.raises(StoreError, match="no column 'loser_id' among the samples; there are sample_id, "):
        store.samples(view=Names)


def test_wrong_latents_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="2 samples came with 1 latents; there must be an array for each"):
        store.append_unit(1, 0, 0, [sample_row("a"), sample_row("b")], latent_list(["a"]))
    with pytest.raises(StoreError, match="must be a float array"):
        store.append_unit(1, 0, 0, [sample_row("a")], [np.zeros((3, 8, 8), np.int64)])
    with pytest.raises(StoreError, match="occurs twice"):
        store.append_unit(1, 0, 0, [sample_row("a"), sample_row("a")], latent_list(["a"]))
    with pytest.raises(StoreError, match="1 samples came with 2 latents"):
        store.append_unit(1, 0, 0, [sample_row("a")], np.zeros((2, 3, 8, 8), np.float32))


def test_wrong_pairs_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_unit(1, 0, 0, [sample_row("a"), sample_row("b")], latent_list(["a", "b"]))
    for bad, message in (
        (pair_row("p", "a", "a"), "both winner and loser"),
        (pair_row("p", "a", "z"), "loser_id 'z' is not a sample"),
        (pair_row("p", "a", "b", explored_id="z"), "explored_id 'z'"),
        (pair_row("p", "a", "b", margin="wide"), "column 'margin' is 'wide'"),
    ):
        with pytest.raises(StoreError, match=message):
            store.append_pairs(1, 0, [bad])
    assert not list(tmp_path.glob("pairs-*"))


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_unit(1, 0, 0, [sample_row("a")], latent_list(["a"]))
    with pytest.raises(StoreError, match="unit 0 of collect 1 is in the store already"):
        store.append_unit(1, 5, 0, [sample_row("b")], latent_list(["b"]))
    store.write_manifest("collect", 1, {})
    with pytest.raises(StoreError, match="collect 1 is complete"):
        store.append_unit(1, 0, 1, [sample_row("b")], latent_list(["b"]))


def test_a_manifest_needs_every_unit_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for unit, name in ((0, "a"), (2, "c")):
        store.append_unit(1, 0, unit, [sample_row(name)], latent_list([name]))
    with pytest.raises(StoreError, match=r"units \[1\] are missing"):
        store.write_manifest("collect", 1, {})
    store.append_unit(1, 0, 1, [sample_row("b")], latent_list(["b"]))
    (tmp_path / "samples-0001-r00-u0001.parquet").unlink()
    with pytest.raises(StoreError, match="half written"):
        store.write_manifest("collect", 1, {})


def test_a_manifest_keeps_its_payload_and_a_damaged_one_is_no_answer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_manifest("train", 2, {"weights": "abc", "loss": float("nan"), "count": np.int64(3)})
    assert store.manifest("train", 2) == {"weights": "abc", "loss": None, "count": 3}
    assert store.is_complete("train", 2) and not store.is_complete("train", 3)
    assert store.completed() == [("train", 2)]
    path.write_text(path.read_text()[:20])
    with pytest.raises(StoreError, match=r"train-0002.json is damaged.*delete it and resume"):
        store.is_complete("train", 2)


def test_human_labels_grow_but_lose_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 2)
    for unit, name in enumerate(("first", "second")):
        store.append_pairs(1, 0, [pair_row(name, "1w0", "1l1", source="human")], unit=unit, stage="label")
        store.write_manifest("label", 1, {})
        assert store.discard_incomplete("label", 1) == []
    assert [row.pair_id for row in store.pairs(source="human")] == ["first", "second"]
    assert len(store.pairs(1)) == 4
    next(tmp_path.glob("pairs-0001-label-r00-u0000*")).unlink()
    with pytest.raises(StoreError, match="a manifest can only grow"):
        store.write_manifest("label", 1, {})


def test_lineage_tells_a_pairs_whole_history(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 6)
    history = store.lineage("pair 1 5")
    assert history.winner == store.sample("1w5") and history.loser == store.sample("1l5")
    assert history.explored == history.winner and history.pair.margin == 1.0
    assert history.weights == {"exploration": "weights of exploration", "main": "weights of main"}
    files = history.files
    assert set(files) == {
        "pairs-0001-r00-u0000.parquet", "samples-0001-p0000.parquet", "latents-0001-p0000.safetensors",
    }  # fmt: skip
    assert {entry["manifest"] for entry in files.values()} == {"collect-0001.json", "pair-0001.json"}
    with pytest.raises(StoreError, match="there is no pair 'nope'"):
        store.lineage("nope")


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 12)
    fill(store, 2, 12)
    assert store.verify() == 2 * (2 + 1)
    shard = tmp_path / "samples-0001-p0000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "latents-0002-p0000.safetensors").unlink()
    (tmp_path / "pairs-0001-r00-u0000.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match="3 problems") as caught:
        store.verify()
    problems = str(caught.value)
    assert "samples-0001-p0000.parquet has sha256" in problems
    assert "latents-0002-p0000.safetensors is missing although collect-0002.json names it" in problems
    assert "pairs-0001-r00-u0000.parquet has 0 bytes, pair-0001.json says" in problems


@pytest.mark.parametrize(("is_complete", "name"), [(True, "0001-p0000"), (False, "0001-r00-u0000")])
def test_damaged_files_are_named_with_what_to_do(tmp_path: Path, is_complete: bool, name: str) -> None:
    fill(Store(tmp_path), 1, 4, complete=is_complete)
    latents, samples = tmp_path / f"latents-{name}.safetensors", tmp_path / f"samples-{name}.parquet"
    whole = latents.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        latents.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match=rf"latents-{name}.safetensors is truncated.*resume"):
            Store(tmp_path).latent("1w0")
    latents.unlink()
    with pytest.raises(StoreError, match=rf"latents-{name}.safetensors is missing"):
        Store(tmp_path).latent("1w0")
    whole = samples.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        samples.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match=rf"samples-{name}.parquet is truncated or damaged"):
            Store(tmp_path).collected(1)


def test_a_foreign_table_in_a_shards_place_is_refused(tmp_path: Path) -> None:
    fill(Store(tmp_path), 1, 1)
    pq.write_table(pa.table({"sample_id": [1]}), tmp_path / "samples-0001-p0000.parquet")
    with pytest.raises(StoreError, match=r"missing: iteration.*of another type: sample_id"):
        Store(tmp_path).samples(1)


def test_latents_that_are_not_those_of_the_rows_do_not_enter_a_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_unit(1, 0, 0, [sample_row("a")], latent_list(["a"]))
    path = tmp_path / "latents-0001-r00-u0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoreError, match="not the file that was written with its rows"):
        store.write_manifest("collect", 1, {})


def test_garbage_goes_and_finished_units_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 1, 4)
    store.append_unit(2, 0, 0, [sample_row("done")], latent_list(["done"]))
    store.append_pairs(2, 0, [pair_row("p", "done", "1w0")])
    garbage = ["latents-0002-r01-u0001.safetensors", "samples-0002-r01-u0001.parquet.tmp"]
    for name in [*garbage, "latents-0003-r00-u0000.safetensors", "notes.txt"]:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "manifests" / "collect-0002.json.tmp").write_bytes(b"{")
    before = {path.name for path in tmp_path.rglob("*")}
    assert set(store.discard_incomplete("collect", 2)) == {*garbage, "collect-0002.json.tmp"}
    assert {path.name for path in tmp_path.rglob("*")} == before - {*garbage, "collect-0002.json.tmp"}
    assert store.discard_incomplete("pair", 2) == ["pairs-0002-r00-u0000.parquet"]
    assert store.discard_incomplete("collect", 1) == store.discard_incomplete("pair", 1) == []
    assert store.latent("done").shape == (3, 8, 8)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_unit(1, 0, 0, [sample_row("a")], latent_list(["a"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            StoreError, match="could not write .*latents-0001-r00-u0001.*free space and resume"
        ):
            store.append_unit(1, 0, 1, [sample_row("b")], latent_list(["b"], (3, 64, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.tmp")) and not store.unit_done(1, 1)
    store.append_unit(1, 0, 1, [sample_row("b")], latent_list(["b"]))
    store.write_manifest("collect", 1, {})
    assert store.verify() == 2 and len(store.samples()) == 2


_WRITER = """
import sys
sys.path[:0] = [sys.argv[2]]
from diffexpo.data.store import Store
from rows import latent_list, sample_row, pair_row
store = Store(sys.argv[1])
print("ready", flush=True)
if not store.is_complete("collect", 1):
    store.discard_incomplete("collect", 1)
    for unit in range(60):
        if not store.unit_done(1, unit):
            names = [f"{unit}-{k}" for k in range(4)]
            store.append_unit(1, 0, unit, [sample_row(n) for n in names], latent_list(names))
    store.write_manifest("collect", 1, {"units": 60})
if not store.is_complete("pair", 1):
    store.discard_incomplete("pair", 1)
    store.append_pairs(1, 0, [pair_row(f"p{u}", f"{u}-0", f"{u}-3") for u in range(60)])
    store.write_manifest("pair", 1, {})
"""


def test_kill_at_any_moment_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def start(root: Path) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", _WRITER, str(root), str(Path(__file__).parents[2])]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def finish(process: subprocess.Popen[str]) -> int:
        code = process.wait()
        assert process.stdout is not None
        process.stdout.close()
        return code

    process = start(tmp_path / "whole")
    started = time.monotonic()
    assert finish(process) == 0
    span = time.monotonic() - started
    killed = 0
    for attempt in range(5):
        process = start(tmp_path / "killed")
        time.sleep(span * (0.1 + 0.12 * attempt))
        process.kill()
        killed += finish(process) != 0
        for row in Store(tmp_path / "killed").collected(1):  # whatever can be seen is whole
            name = row.sample_id
            assert Store(tmp_path / "killed").latent(name).tobytes() == latents_of([name])[name].tobytes()
            break
    assert finish(start(tmp_path / "killed")) == 0
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 2 + 1 + 2
    assert killed >= 1


def test_the_store_loads_without_torch() -> None:
    code = "import sys, diffexpo.data, diffexpo.data.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_rows_read_in_seconds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tiny = np.zeros((1, 1, 1), np.float32)
    for unit in range(4):
        rows = [sample_row(f"{unit}-{k}", seed_key=json.dumps([0, unit, k])) for k in range(5000)]
        store.append_unit(1, 0, unit, rows, [tiny] * len(rows))
    store.write_manifest("collect", 1, {})
    start = time.process_time()
    assert len(store.samples(1)) == 20_000
    assert time.process_time() - start < 3  # a fifth of a hundred thousand; about 0.4 s on an old core


def test_a_store_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no store"):
        Store(tmp_path / "none", create=False)


def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill(Store(run / "store"), 1, 1)
    (run / "config.yaml").write_text("seed: 1\n")
    before = sorted(run.rglob("*"))
    for create in (True, False):
        with pytest.raises(StoreError, match=f"{run} is not a store.*did you mean {run / 'store'}"):
            Store(run, create=create)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="expected a run's folder `store`"):
        Store(tmp_path / "other")
    assert sorted(run.rglob("*")) == before and not (tmp_path / "other" / "manifests").exists()


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["latents", "samples", "pairs"])
@pytest.mark.parametrize("at_once", [1 << 26, 0])
def test_nothing_is_built_on_damaged_data(
    tmp_path: Path, kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed bit anywhere is found at once, or, where much is to be read, before the next stage is complete."""
    monkeypatch.setattr("diffexpo.data.audit.AT_ONCE", at_once)
    fill(Store(tmp_path), 1, 6)
    file = next(tmp_path.glob(f"{kind}-0001-*"))
    sound = file.read_bytes()
    for place in range(0, len(sound), len(sound) // 5):
        flip(file, place)
        store = Store(tmp_path)
        with pytest.raises(StoreError, match=f"{file.name} has sha256 .*restore it from a copy, or delete"):
            store.check()
            store.write_manifest("train", 1, {})
        file.write_bytes(sound)
    store = Store(tmp_path)
    store.check()
    store.write_manifest("train", 1, {})


def test_what_a_manifest_names_must_be_there(tmp_path: Path) -> None:
    fill(Store(tmp_path), 1, 6)
    next(tmp_path.glob("pairs-0001-*")).unlink()
    with pytest.raises(StoreError, match="is missing although pair-0001.json names it"):
        Store(tmp_path).check()


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_manifest("train", 1, {"weights": "abc", "cost": 12})
    sound = path.read_bytes()
    for place, bit in product(range(len(sound)), range(8)):
        flip(path, place, bit)
        try:
            assert store.manifest("train", 1) == {"weights": "abc", "cost": 12}, "only white space may change"
        except StoreError as error:
            assert "is damaged" in str(error) or "use the version that wrote it" in str(error)
        path.write_bytes(sound)


def test_a_manifest_of_another_stage_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.write_manifest("train", 1, {"cost": 1})
    first.with_name("train-0002.json").write_bytes(first.read_bytes())
    with pytest.raises(StoreError, match="it is that of train 1"):
        store.manifest("train", 2)
