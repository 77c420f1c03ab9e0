"""Processes that were not started alike are refused by all of them, with what differs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from diffexpo.assembly import together
from diffexpo.config import load_config
from diffexpo.errors import ConfigError
from diffexpo.training.distributed import World
from diffexpo.training.group import Group, open_door


def in_two_processes(work: Callable[[World], None]) -> list[str]:
    """What each of two is told, "" if nothing is wrong; they are threads here, each with its own connection."""
    door, listener = open_door("127.0.0.1")
    told = ["", ""]

    def member(rank: int) -> None:
        group = Group(rank, 2, door, None if rank else listener)
        try:
            work(World(rank, 2, group=group))
        except ConfigError as error:
            told[rank] = str(error)
        group.close(None)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return told


def test_the_same_command_starts(tmp_path: Path) -> None:
    config = load_config(["emoji/expo"]).config

    def start(world: World) -> None:
        together.check_same_start(config, tmp_path, world)
        together.check_shared_folder(tmp_path, world)

    assert in_two_processes(start) == ["", ""] and not list(tmp_path.iterdir())


def test_other_settings_and_folders_are_named(tmp_path: Path) -> None:
    configs = [load_config(["emoji/expo"], [f"seed={seed}"]).config for seed in (0, 1)]
    told = in_two_processes(lambda world: together.check_same_start(configs[world.rank], tmp_path, world))
    assert told[0] == told[1] and "the fingerprint of the settings is " in told[0]
    folders = [tmp_path / "one", tmp_path / "two"]
    told = in_two_processes(lambda world: together.check_same_start(configs[0], folders[world.rank], world))
    differ = f"the run folder is {folders[0]} in process 0 but {folders[1]} in process 1; start all processes"
    assert told == [f"{differ} with the same command, code and folder"] * 2


def test_folders_of_one_name_on_two_disks_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_PATIENCE_S", 0.3)
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    told = in_two_processes(lambda world: together.check_shared_folder(tmp_path / str(world.rank), world))
    assert all("of process 0 is not that of processes 1" in text and "--out" in text for text in told)
    assert not list(tmp_path.glob("*/*"))


def test_the_fingerprint_of_the_code_is_that_of_its_files() -> None:
    assert (
        together.code_fingerprint() == together.code_fingerprint() and len(together.code_fingerprint()) == 12
    )
