"""Settings that a run may continue with other values of: they change memory and speed, and results by
rounding at most.

Everything else decides what is drawn, scored or trained: a run that changed it midway would be neither of the
two runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffexpo.config.load import LoadedConfig, leaves, load_config
from diffexpo.config.run import RunConfig
from diffexpo.errors import ConfigError

CHANGEABLE = (
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.pair_gradient",
    "training.checkpoint_every",
    "tuning.reference_dtype",
    "tuning.reference_device",
    "model.vae_slicing",
    "explore.overlap_scoring",
)


def resumed_config(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The configuration of an existing run (`config.yaml`) with changes of settings that leave its results
    alone.

    Args:
        path: The run's config.yaml.
        overrides: `a.b=value` strings of `--set`.
    Returns:
        The configuration, untouched by the environment; without overrides it is `read_resolved(path)`.
    Raises:
        ConfigError: a setting that decides results, or one that does not exist.
    """
    found = load_config([path], overrides, {})
    refused = [
        name
        for name in differences(load_config([path], (), {}).config, found.config)
        if name not in CHANGEABLE
    ]
    if refused:
        raise ConfigError(
            f"--set {refused[0]} with --resume: results depend on it, so a resumed run keeps it; start a new "
            f"run to change it. These can change: {', '.join(CHANGEABLE)}"
        )
    return found


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """Dotted paths of the settings that differ."""
    old, new = (dict(leaves(config.model_dump(mode="json"))) for config in (before, after))
    return sorted(
        name
        for name in old.keys() | new.keys()
        if name not in old or name not in new or old[name] != new[name]
    )
