"""Whether an image shows the scene that its prompt asks for: cards of `rewards/scenes.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import NetworkCard


class SceneCard(NetworkCard):
    """What both scores share."""

    path_is: ClassVar[str] = "a folder with a checker, or scenes:checker_train"
    source: ClassVar[str] = "shipped with the package"
    licence: ClassVar[str] = "Apache-2.0"
    papers: ClassVar[tuple[str, ...]] = ("ghosh2023geneval",)
    is_sized_by_files: ClassVar[bool] = True


class SceneScoreCard(SceneCard):
    """How nearly right: something to climb."""

    scorer: ClassVar[str] = "SceneScore"
    what: ClassVar[str] = "how surely an image shows the scene of its prompt and nothing else"
    unit: ClassVar[str] = "sum of log-probabilities of facts, about -20 to 0"
    score_range: ClassVar[tuple[float, float] | None] = (-60.0, 0.0)

    type: Literal["scene_score"] = "scene_score"


class SceneCorrectCard(SceneCard):
    """Entirely right or not."""

    scorer: ClassVar[str] = "SceneCorrect"
    what: ClassVar[str] = "whether an image shows the scene of its prompt and nothing else"
    unit: ClassVar[str] = "1 entirely right, 0 not"
    score_range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    type: Literal["scene_correct"] = "scene_correct"
