"""The training methods: one card a file, and the table of those that `algorithm.type` chooses among. The code
of each is a class named after its type in `diffexpo/algorithms/<type>.py`. Imports without torch."""

from collections.abc import Mapping
from inspect import get_annotations
from typing import TYPE_CHECKING, Annotated, TypeVar, Union

from pydantic import BeforeValidator, Field

from diffexpo.config.methods.awm import AwmConfig
from diffexpo.config.methods.bases import DECAY
from diffexpo.config.methods.card import MethodConfig
from diffexpo.config.methods.d3po import D3poConfig
from diffexpo.config.methods.ddpo import DdpoConfig
from diffexpo.config.methods.dgpo import DgpoConfig
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.diffusion_kto import DiffusionKtoConfig
from diffexpo.config.methods.diffusion_nft import DiffusionNftConfig
from diffexpo.config.methods.dpok import DpokConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.config.methods.flow_grpo import FlowGrpoConfig
from diffexpo.config.methods.guidance_distillation import GuidanceDistillationConfig
from diffexpo.config.methods.improvement_dpo import ImprovementDpoConfig
from diffexpo.config.methods.mapo import MapoConfig
from diffexpo.config.methods.orpo import OrpoConfig
from diffexpo.config.methods.prdp import PrdpConfig
from diffexpo.config.methods.python import PythonConfig
from diffexpo.config.methods.rwr import RwrConfig
from diffexpo.config.methods.sft import SftConfig
from diffexpo.config.methods.spin import SpinConfig
from diffexpo.config.methods.spo import SpoConfig

Chosen = TypeVar("Chosen", bound=MethodConfig)

METHODS: tuple[type[MethodConfig], ...] = (
    ExpoConfig,
    DiffusionDpoConfig,
    SpinConfig,
    ImprovementDpoConfig,
    MapoConfig,
    OrpoConfig,
    SftConfig,
    GuidanceDistillationConfig,
    DiffusionKtoConfig,
    RwrConfig,
    DiffusionNftConfig,
    AwmConfig,
    DgpoConfig,
    DdpoConfig,
    DpokConfig,
    D3poConfig,
    SpoConfig,
    PrdpConfig,
    FlowGrpoConfig,
    PythonConfig,
)


def name_of(method: type[MethodConfig]) -> str:
    """The value of `algorithm.type` that chooses a method."""
    return str(method.model_fields["type"].default)


DEFAULT_METHOD = name_of(ExpoConfig)
METHOD_BY_NAME: dict[str, type[MethodConfig]] = {name_of(method): method for method in METHODS}


def _named(value: object) -> object:
    """Settings that name no method are of the default one."""
    if isinstance(value, Mapping) and "type" not in value:
        return {"type": DEFAULT_METHOD, **value}
    return value


if TYPE_CHECKING:
    AlgorithmConfig = MethodConfig
else:
    AlgorithmConfig = Annotated[
        Annotated[Union[METHODS], Field(discriminator="type")],  # noqa: UP007 (a tuple of classes)
        BeforeValidator(_named),
    ]
"""Settings of any method in `METHODS`, told apart by `type`."""


def same_meaning(first: type[MethodConfig], second: type[MethodConfig], name: str) -> bool:
    """Whether both methods have a setting of this name and inherit it from the same class.

    Args:
        first, second: Settings classes of two methods.
        name: Of a setting.
    Returns:
        True for `beta` of EXPO and SPIN (both have the margin's), False for `beta` of EXPO and MaPO.
    """
    if name not in first.model_fields or name not in second.model_fields:
        return False
    return _declared_by(first, name) is _declared_by(second, name)


def carry_over(settings: MethodConfig, method: type[Chosen], **changes: object) -> Chosen:
    """The settings of another method, with every value that means the same in both taken over.

    Args:
        settings: Of the method that is left.
        method: Settings class of the method that is taken.
        changes: Values to set besides.
    Returns:
        Settings of `method`; what it does not share with the other one has its default.
    """
    shared = {
        name: getattr(settings, name)
        for name in method.model_fields
        if name != "type" and same_meaning(type(settings), method, name)
    }
    return method.model_validate(shared | changes)


def offline_baseline(settings: MethodConfig, *, starts_apart: bool = False) -> MethodConfig:
    """The method that `baseline.offline_dpo` trains on the offline pairs alone, with what it shares with the
    run's own: beta, draws, anchor. One iteration has no iterate to follow, so its reference is where it
    starts: the base, or with `starts_apart` the model of `tuning.start`."""
    reference = "previous" if starts_apart else "base"
    return carry_over(
        settings, DiffusionDpoConfig, uncertainty="off", reference=reference, reference_decay=DECAY
    )


def _declared_by(settings: type[MethodConfig], name: str) -> type:
    return [ancestor for ancestor in settings.__mro__ if name in get_annotations(ancestor)][-1]


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "METHOD_BY_NAME",
    "AlgorithmConfig",
    "MethodConfig",
    "offline_baseline",
]
