"""Which iterate is kept, and where a run ends, from the scores alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo.config import RunConfig, load_config
from diffexpo.data.store import Store
from diffexpo.errors import MissingError
from diffexpo.online.keeping import best_iterate, is_over, kept_iterate, last_iteration, validated
from diffexpo.online.loop import schedule


def config(**explore: object) -> RunConfig:
    judge = {"name": "chooses", "type": "jpeg_compressibility"}
    named = {"prompts": "emoji:animals", "judges": [judge]}
    best = {"keep": "best", "validation": named} if explore.get("keep", "best") == "best" else {}
    settings = [f"explore.{name}={value}" for name, value in ({"iterations": 6} | best | explore).items()]
    return load_config([], settings, {}).config


def store_of(folder: Path, means: list[float]) -> Path:
    """A store with a validation of each iterate."""
    store = Store(folder / "store")
    for iteration, mean in enumerate(means, start=1):
        store.write_manifest("validate", iteration, {"mean": mean})
    return store.root


@pytest.mark.parametrize(
    ("means", "best"),
    [({1: 0.2}, 1), ({1: 0.2, 2: 0.5, 3: 0.4}, 2), ({3: 0.5, 1: 0.2, 2: 0.5}, 2), ({1: -3.0, 2: -2.5}, 2)],
)
def test_the_highest_is_kept_and_of_equal_ones_the_earliest(means: dict[int, float], best: int) -> None:
    assert best_iterate(means) == best


@pytest.mark.parametrize(
    ("means", "patience", "over"),
    [
        ([0.5], 1, False),
        ([0.5, 0.4], 1, True),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4, 0.3, 0.2], None, False),
    ],
)
def test_patience_counts_iterations_without_a_better_score(
    means: list[float], patience: int | None, over: bool
) -> None:
    assert is_over(dict(enumerate(means, start=1)), patience) is over


def test_a_run_ends_where_its_patience_does_and_keeps_the_best_up_to_there(tmp_path: Path) -> None:
    # The last score would be the best, but a run that stops never sees it.
    root = store_of(tmp_path, [0.3, 0.5, 0.4, 0.5, 0.9])
    settings = config(patience=2)
    assert last_iteration(settings, root) == 4
    assert validated(root) == {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.9}
    short = store_of(tmp_path / "short", [0.3, 0.5, 0.4, 0.5])
    assert kept_iterate(settings, short) == 2
    patient = config(patience=3)
    assert last_iteration(patient, short) == 6
    with pytest.raises(MissingError, match="iteration 6 .* is not validated"):
        kept_iterate(patient, short)


def test_a_run_that_keeps_the_last_needs_no_store(tmp_path: Path) -> None:
    plain, nowhere = config(keep="last"), tmp_path / "none"
    assert (last_iteration(plain, nowhere), kept_iterate(plain, nowhere)) == (6, 6)
    assert not nowhere.exists()


@pytest.mark.parametrize("method", ["expo", "ddpo"])
def test_validation_comes_before_each_evaluation_and_nowhere_without_it(method: str) -> None:
    given = {"ddpo": ["offline.source=null", "explore.sampler.name=ddpm", "explore.sampler.steps=4"]}
    more = [f"algorithm.type={method}", *given.get(method, [])]
    plain = load_config([], more, {}).config
    keeping = ["explore.keep=best", "explore.validation.prompts=emoji:animals"]
    keeping.append("explore.validation.judges=[{name: chooses, type: jpeg_compressibility}]")
    stages = schedule(load_config([], [*more, *keeping], {}).config)
    assert [one for one in stages if one[0] != "validate"] == schedule(plain)
    before = [stages[place - 1] for place, (name, _) in enumerate(stages) if name == "evaluate"]
    assert before == [("validate", iteration) for iteration in range(1, plain.explore.iterations + 1)]
