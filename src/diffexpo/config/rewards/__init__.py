"""The rewards: one card a type, each in the file named like its code in `diffexpo.rewards`. Imports without
torch."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field, TypeAdapter

from diffexpo.config.rewards.aesthetic import AestheticCard
from diffexpo.config.rewards.balance import BalanceCard
from diffexpo.config.rewards.card import RewardCard
from diffexpo.config.rewards.clip import ClipCard
from diffexpo.config.rewards.geneval import GenEvalCard
from diffexpo.config.rewards.groups import SelfJudgeConfig, ServiceConfig, VlmConfig
from diffexpo.config.rewards.hps import Hpsv2Card, Hpsv21Card
from diffexpo.config.rewards.human import HumanCard
from diffexpo.config.rewards.imagereward import ImageRewardCard
from diffexpo.config.rewards.jpeg import JpegCompressibilityCard, JpegIncompressibilityCard
from diffexpo.config.rewards.ocr import OcrCard
from diffexpo.config.rewards.pickscore import PickScoreCard
from diffexpo.config.rewards.python_file import PythonCard
from diffexpo.config.rewards.quality import BrisqueCard, OpenNsfwCard
from diffexpo.config.rewards.remote import RemoteCard
from diffexpo.config.rewards.scenes import SceneCorrectCard, SceneLooksCard, SceneScoreCard
from diffexpo.config.rewards.self_judging import DenoisingCard, ImplicitCard
from diffexpo.config.rewards.vlm import VlmCard

CARDS: tuple[type[RewardCard], ...] = (
    ClipCard,
    PickScoreCard,
    Hpsv2Card,
    Hpsv21Card,
    ImageRewardCard,
    AestheticCard,
    JpegCompressibilityCard,
    JpegIncompressibilityCard,
    PythonCard,
    RemoteCard,
    VlmCard,
    OcrCard,
    BrisqueCard,
    OpenNsfwCard,
    ImplicitCard,
    DenoisingCard,
    GenEvalCard,
    SceneScoreCard,
    SceneCorrectCard,
    SceneLooksCard,
    HumanCard,
    BalanceCard,
)
REWARDS: dict[str, type[RewardCard]] = {card.kind(): card for card in CARDS}
"""Every value of a reward's `type` with its card."""

if TYPE_CHECKING:
    RewardConfig = RewardCard
else:
    RewardConfig = Annotated[Union[CARDS], Field(discriminator="type")]  # noqa: UP007 (a tuple of classes)
"""Settings of any reward, told apart by `type`."""


def read_card(**values: object) -> RewardCard:
    """The card of a reward with these settings; `type` says which.

    Raises:
        pydantic.ValidationError: settings that are wrong by themselves.
    """
    return TypeAdapter(RewardConfig).validate_python(values)


__all__ = [
    "REWARDS",
    "RewardCard",
    "RewardConfig",
    "SelfJudgeConfig",
    "ServiceConfig",
    "VlmConfig",
    "read_card",
]
