"""Whether an image shows the scene that its prompt asks for, and how good it looks: cards of
`rewards/scenes.py`."""

from typing import Literal

from diffexpo.config.rewards.card import ClipLikeCard, NetworkCard


class SceneCard(NetworkCard):
    """What both scores share."""

    path_is = "a checker's folder, or scenes:checker_train"
    source = "shipped with the package"
    licence = "Apache-2.0"
    papers = ("ghosh2023geneval",)
    biases = "a small detector: it errs, and finds only what it was taught"
    is_sized_by_files = True
    why_unverified = (
        "reads prompts of scenes, and the shipped images are single emoji; `python -m worlds.scenes quality` "
        "measures it"
    )


class SceneScoreCard(SceneCard):
    """How nearly right: something to climb."""

    scorer = "SceneScore"
    what = "how surely an image shows the scene of its prompt and nothing else"
    unit = "sum of log-probabilities of facts, about -20 to 0"
    score_range = (-60.0, 0.0)

    type: Literal["scene_score"] = "scene_score"


class SceneCorrectCard(SceneCard):
    """Entirely right or not."""

    scorer = "SceneCorrect"
    what = "whether an image shows the scene of its prompt and nothing else"
    unit = "1 entirely right, 0 not"
    score_range = (0.0, 1.0)
    is_right_or_wrong = True

    type: Literal["scene_correct"] = "scene_correct"


class SceneLooksCard(ClipLikeCard):
    """How good an image looks, whatever it shows."""

    scorer = "SceneLooks"
    what = "how good an image of a scene looks, right or wrong: sharp, whole sprites on a clean background"
    unit = "cosine times the logit scale; differences are log-odds of a preference"
    path_is = "a CLIPModel folder, or scenes:looks_train"
    source = "shipped with the package"
    licence = "Apache-2.0"
    papers = ("kirstain2023pickapic",)
    biases = "hardly reads the prompt"
    is_sized_by_files = True
    why_unverified = (
        "judges whole scenes, and the shipped images are single emoji; `python -m worlds.scenes looks` "
        "measures it"
    )

    type: Literal["scene_looks"] = "scene_looks"
