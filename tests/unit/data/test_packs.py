"""Packs of complete stages hold what their units held, whichever moment the process that makes them dies at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexpo.data import packs
from diffexpo.data.store import Store
from diffexpo.errors import StoreError
from tests.rows import latent_list, latents_of, pair_row, sample_row

from .conftest import fill


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def write_units(store: Store, units: int = 5, stage: str = "collect", ranks: int = 1) -> list[str]:
    """Units of three samples, whatever is there already; the names in order."""
    for unit in range(units):
        names = [f"{unit}-{k}" for k in range(3)]
        if not store.unit_done(1, unit, stage=stage):
            rows = [sample_row(name, f"prompt {name}") for name in names]
            store.append_unit(1, unit % ranks, unit, rows, latent_list(names), stage=stage)
    return [f"{unit}-{k}" for unit in range(units) for k in range(3)]


def test_packs_hold_what_the_units_held_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "_PACK_ROWS", 7)  # two units a pack
    store = Store(tmp_path)
    names = write_units(store)
    before = store.collected(1)
    store.write_manifest("collect", 1, {"a": 1})
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        *(f"latents-0001-p000{number}.safetensors" for number in range(3)),
        *(f"samples-0001-p000{number}.parquet" for number in range(3)),
    ]
    other = Store(tmp_path)
    for rows in (store.samples(1), other.collected(1), other.samples_of(names)):
        assert [row.sample_id for row in rows] == names
        kept = [(row.unit, row.prompt, row.rewards) for row in rows]
        assert kept == [(row.unit, row.prompt, row.rewards) for row in before]
    assert [row.latent_file for row in other.samples()[:7]] == ["latents-0001-p0000.safetensors"] * 6 + [
        "latents-0001-p0001.safetensors"
    ]
    asked = names[::-1] + names[:2]
    expected = np.stack([latents_of([name])[name] for name in asked])
    np.testing.assert_array_equal(other.latents(asked), expected)
    assert other.manifest("collect", 1) == {"a": 1} and other.verify() == 6
    with pytest.raises(StoreError, match="there is no sample 'nothing'"):
        other.latents(["0-0", "nothing"])


def test_shapes_and_types_of_a_pack_may_differ_and_other_programs_read_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shapes = [(2, 2, 2), (2, 3, 2), (2, 2, 2), (2, 2, 3)]
    arrays = [latents_of([str(k)], shape)[str(k)] for k, shape in enumerate(shapes)]
    arrays[2] = arrays[2].astype(np.float64)
    arrays[3] = arrays[3].astype(np.float16)
    for unit in (0, 1):
        names = [str(k) for k in (2 * unit, 2 * unit + 1)]
        store.append_unit(1, 0, unit, [sample_row(name) for name in names], arrays[2 * unit : 2 * unit + 2])
    store.append_unit(1, 0, 2, [], [])
    store.write_manifest("collect", 1, {})
    for name, array in enumerate(arrays):
        read = Store(tmp_path).latent(str(name))
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()
    tensors = load_file(tmp_path / "latents-0001-p0000.safetensors")
    assert (
        tensors["latents.0"].dtype == np.float64 and tensors["latents.0"][0].tobytes() == arrays[2].tobytes()
    )
    assert tensors["group"].tolist() == [1, 2, 0, 3] and tensors["position"].tolist() == [0, 0, 0, 0]


def test_packs_do_not_depend_on_the_processes_that_wrote_the_units(tmp_path: Path) -> None:
    for folder, ranks in (("one", 1), ("three", 3)):
        store = Store(tmp_path / folder)
        write_units(store, ranks=ranks)
        store.write_manifest("collect", 1, {})
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_sample_that_two_processes_wrote_does_not_enter_a_manifest(tmp_path: Path) -> None:
    stores = [Store(tmp_path) for _ in range(2)]
    for unit, name in enumerate(("first", "second", "same", "same")):  # each has begun before "same"
        stores[unit % 2].append_unit(1, unit % 2, unit, [sample_row(name)], latent_list([name]))
    with pytest.raises(StoreError, match=r"'same' is in both samples-0001-r00-u0002.* and .*r01-u0003"):
        stores[0].write_manifest("collect", 1, {})
    assert not Store(tmp_path).is_complete("collect", 1)


def test_a_process_that_knew_the_units_finds_them_in_the_packs(tmp_path: Path) -> None:
    writer, reader = Store(tmp_path), Store(tmp_path)
    names = write_units(writer)
    first = reader.latents(names)
    writer.write_manifest("collect", 1, {})
    np.testing.assert_array_equal(reader.latents(names), first)
    assert reader.sample("4-2").latent_file == "latents-0001-p0000.safetensors"
    assert reader.unit_done(1, 4) and not reader.unit_done(1, 5)


def test_nothing_that_is_done_for_a_unit_or_a_batch_lists_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    fill(store, 1, 8)
    store.append_unit(2, 0, 0, [sample_row("first")], latent_list(["first"]))

    def refuse(*arguments: object) -> None:
        raise AssertionError("a folder is listed")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert not store.unit_done(2, 1)
    store.append_unit(2, 0, 1, [sample_row("a"), sample_row("b")], latent_list(["a", "b"]))
    assert store.unit_done(2, 1)
    assert store.latents(["1w0", "a", "1l7"]).shape == (3, 3, 8, 8) and store.sample("b").unit == 1


class Killed(BaseException):
    """What a process that is killed raises nowhere."""


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """Nothing on the disk changes from the n-th renaming or removing on."""
    whole, count = {name: getattr(os, name) for name in ("replace", "unlink")}, 0

    def guarded(name: str):
        def change(*arguments, **named):
            nonlocal count
            count += 1
            if count >= operation:
                raise Killed if count == operation else OSError("dead")
            return whole[name](*arguments, **named)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in whole:
            patch.setattr(os, name, guarded(name))
        yield


def test_killed_at_any_change_of_the_disk_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        store = Store(root)
        if not store.is_complete("offline", 1):
            store.discard_incomplete("offline", 1)
            names = write_units(store, 2, "offline")
            for unit in range(2):
                if not store.unit_done(1, unit, stage="offline"):
                    pair = pair_row(f"p{unit}", names[3 * unit], names[3 * unit + 1])
                    store.append_pairs(1, 0, [pair], unit=unit, stage="offline")
            store.write_manifest("offline", 1, {"units": 2})

    work(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) == 4
    for operation in range(1, 100):
        root = tmp_path / str(operation)
        try:
            with killed_at(operation):
                work(root)
            break
        except Killed:
            work(root)
            Store(root)
            assert contents(root) == expected, operation
    assert operation == 2 * 3 + 3 + 1 + 2 * 3 + 1
