"""The whole configuration of a run: its groups, its training method, and the refusal of wrong
combinations."""

from __future__ import annotations

from pydantic import Field, model_validator

from diffexpo.config.methods import AlgorithmConfig, default_method
from diffexpo.config.rewards import RewardConfig, read_card
from diffexpo.config.rules import check_combinations
from diffexpo.config.schema import (
    BaselineConfig,
    EvaluationConfig,
    ExploreConfig,
    HybridConfig,
    MixtureConfig,
    ModelConfig,
    OfflineConfig,
    PairingConfig,
    PromptConfig,
    TrainingConfig,
    TuningConfig,
)
from diffexpo.config.section import Section


class RunConfig(Section):
    name: str = Field(default="expo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run name; the default folder is `runs/<name>`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The one seed. Every random number is keyed by it and by what it is for."""
    model: ModelConfig = ModelConfig()
    tuning: TuningConfig = TuningConfig()
    prompts: PromptConfig = PromptConfig()
    explore: ExploreConfig = ExploreConfig()
    rewards: tuple[RewardConfig, ...] = (
        read_card(name="judge_train", type="clip", path="emoji:judge_train"),
    )
    """Scorers of images: those with `role: train` rank them."""
    mixture: MixtureConfig = MixtureConfig()
    pairing: PairingConfig = PairingConfig()
    offline: OfflineConfig = OfflineConfig()
    hybrid: HybridConfig = HybridConfig()
    algorithm: AlgorithmConfig = default_method()
    """The training method; it decides which other settings this group has. A recipe's settings of another
    method do not carry over to it, except those that mean the same in both."""
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baseline: BaselineConfig = BaselineConfig()

    @model_validator(mode="after")
    def _refuse_wrong_combinations(self) -> RunConfig:
        check_combinations(self)
        return self
