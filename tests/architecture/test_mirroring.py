"""A unit test stands where its module does: `tests/unit/<room>/test_<module>.py`, or it is listed here with its subject."""

from __future__ import annotations

from pathlib import Path

from tests.architecture.tree import FILES, ROOT, SOURCE

UNIT = ROOT / "tests" / "unit"
# Tests of what several modules do together.
SUBJECTS = {
    "config/test_scenes_recipes": "every recipe of the scenes",
    "test_without_reward": "runs of methods that need no reward",
    "algorithms/test_losses": "every loss: shapes, gradients, refusals",
    "algorithms/test_methods": "every method that learns from images",
    "algorithms/test_needs": "what every method needs of a run",
    "algorithms/test_trajectory_methods": "every method that learns from trajectories",
    "assembly/test_prompts": "prompts by alias and by file",
    "config/test_buckets": "settings of several sizes",
    "data/test_buckets": "images of several sizes, from the store to batches",
    "data/test_hostile": "damaged and malicious files",
    "data/test_importers": "what every importer of preference sets has in common",
    "data/test_later_columns": "stores written before a column existed",
    "data/test_offline": "the package `data/offline`",
    "online/test_buckets": "sizes drawn for a collection",
    "online/test_conflicts": "rewards that disagree",
    "online/test_late_process": "a process that comes late to a collection",
    "online/test_merged_drawing": "drawing with folded weights",
    "online/test_overlap": "scoring while the next batch is drawn",
    "online/test_scored_loop": "the loop of methods that learn from scored images",
    "policies/test_hub": "names on the model hub",
    "policies/test_merged": "folded low-rank weights",
    "policies/test_predict": "predictions of every family",
    "policies/test_settings": "the settings of every family",
    "policies/test_unet_families": "Stable Diffusion 1, 2 and XL",
    "rewards/test_models": "rewards that are models",
}


def name_of_test(path: Path) -> str:
    return path.relative_to(UNIT).with_suffix("").as_posix()


def mirrors(path: Path, modules: set[str]) -> bool:
    """Whether a module of that name stands in the room, directly or in a folder of the room."""
    room, name = path.relative_to(UNIT).parent.as_posix(), path.stem.removeprefix("test_")
    if room == ".":
        return name in modules
    return any(module.startswith(f"{room}/") and module.endswith(f"/{name}") for module in modules)


def test_unit_tests_mirror_modules() -> None:
    modules = {path.relative_to(SOURCE).with_suffix("").as_posix() for path in FILES}
    lonely = {name_of_test(path) for path in UNIT.rglob("test_*.py") if not mirrors(path, modules)}
    assert not lonely - set(SUBJECTS), "mirror a module, or name the subject in SUBJECTS"


def test_listed_subjects_exist() -> None:
    tests = {name_of_test(path) for path in UNIT.rglob("test_*.py")}
    assert not set(SUBJECTS) - tests, "these tests are gone; take them off the list"


def test_tests_of_the_makers_mirror_them() -> None:
    makers = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "worlds").rglob("*.py")}
    for path in (ROOT / "tests" / "worlds").rglob("test_*.py"):
        world = path.parent.relative_to(ROOT / "tests").as_posix()
        name = path.stem.removeprefix("test_")
        assert makers & {f"{world}/{name}", f"{world}/__{name}__"}, path
