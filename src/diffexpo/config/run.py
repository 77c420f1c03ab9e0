"""The whole configuration of a run: its groups, its method, and the refusal of wrong combinations."""

from typing import Self

from pydantic import model_validator

from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME, AlgorithmConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.rules import check_combinations


class RunConfig(Run):
    """All settings of a run; wrong combinations are refused when one is made."""

    algorithm: AlgorithmConfig = METHOD_BY_NAME[DEFAULT_METHOD].model_validate({})
    """The training method; it decides which other settings this group has. A recipe's settings of another
    method do not carry over to it, except those that mean the same in both."""

    @model_validator(mode="after")
    def _refuse_wrong_combinations(self) -> Self:
        check_combinations(self)
        return self
