"""Batches of pictures of two sizes: what is learned does not depend on how they are cut, nor on how many processes there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffexpo.training import batches, engine
from diffexpo.types import MixedRows
from tests.commands import module_in_two_processes
from tests.invariants.mixed_sizes import IN_TWO_PROCESSES, SEVERAL_SIZES, run
from tests.invariants.test_every_split import assert_same_run

Seen = dict[str, list[bool]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Of each step of each whole run, whether its batch held two sizes."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, seen: Seen) -> Callable[[str], Path]:
    """The folder of a method's run in one process with micro-batches as large as they may be, made when first asked for."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            taken: list[bool] = []
            plain = engine.micro_batches

            def watched(batch, *split):
                taken.append(any(isinstance(value, MixedRows) for value in vars(batch).values()))
                return plain(batch, *split)

            engine.micro_batches = watched
            try:
                run(name, root)
            finally:
                engine.micro_batches = plain
            seen[name] = taken
        return root / name

    return folder


@pytest.mark.parametrize("name", SEVERAL_SIZES)
def test_micro_batches_of_2_are_one_batch(
    name: str, whole: Callable[[str], Path], seen: Seen, tmp_path: Path
) -> None:
    run(name, tmp_path, micro_batch_size=2)
    assert_same_run(tmp_path / name, whole(name))
    assert any(seen[name]), "no batch held two sizes"


def test_two_processes_are_one(whole: Callable[[str], Path], tmp_path: Path) -> None:
    module_in_two_processes("tests.invariants.mixed_sizes", tmp_path)
    for name in IN_TWO_PROCESSES:
        assert_same_run(tmp_path / name, whole(name))


def test_equal_weights_of_micro_batches_would_be_seen(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from a size must not depend on how few pictures of it a batch holds."""
    plain = batches.micro_batches

    def equal(batch, *split):
        parts = plain(batch, *split)
        return [(part, 1 / len(parts)) for part, _ in parts]

    monkeypatch.setattr(engine, "micro_batches", equal)
    run("diffusion_dpo", tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "diffusion_dpo", whole("diffusion_dpo"))
