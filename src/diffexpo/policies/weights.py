"""Named versions of the trainable weights on one base: adapters (LoRA) or module copies (full fine-tuning).

Both satisfy `diffexpo.types.WeightSets` and add `network` (the module that runs now), `base_module` and
`fingerprint(name)`. "current" is trained, "base" never changes, "reference" is the base until something is
copied or loaded onto it.
"""

from __future__ import annotations

from diffusers import ModelMixin

from diffexpo.config.families import Family
from diffexpo.config.families.card import LORA_TARGETS
from diffexpo.config.schema import TuningConfig
from diffexpo.policies.adapters import LoraWeightSets
from diffexpo.policies.copies import CopyWeightSets
from diffexpo.policies.loading import DTYPES
from diffexpo.policies.states import fingerprint_state

__all__ = ["CopyWeightSets", "LoraWeightSets", "fingerprint_state", "inert_parameters", "make_weights"]


def make_weights(
    network: ModelMixin, tuning: TuningConfig, seed: int, card: Family | None = None
) -> LoraWeightSets | CopyWeightSets:
    """Adapters, whose factors the run's seed keys, or copies on a denoiser, as the tuning kind says.

    The family's card has the targets of adapters where the settings name none, and the parameters that cannot
    get a gradient.
    """
    if tuning.kind == "lora":
        targets = tuning.lora.target_modules or (card.lora_targets if card else LORA_TARGETS)
        return LoraWeightSets(network, tuning.lora, seed, targets)
    return CopyWeightSets(
        network,
        inert_parameters(card, network) if card else (),
        reference_dtype=DTYPES[tuning.reference_dtype],
        parks_copies=tuning.reference_device == "cpu",
    )


def inert_parameters(card: Family, network: ModelMixin) -> tuple[str, ...]:
    """Names of a denoiser's parameters that no gradient can reach, or that change nothing."""
    return card.inert_parameters(network.config, (name for name, _ in network.named_parameters()))
