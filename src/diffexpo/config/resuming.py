"""Settings that a resumed run may change: they decide memory and speed, and results by rounding at most."""

from collections.abc import Sequence
from pathlib import Path

from diffexpo.config.load import LoadedConfig, leaves, load_config, read_resolved
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
    "tracking.trackers",
    "tracking.project",
)


def resumed_config(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The configuration of an existing run (`config.yaml`) with changes that leave its results alone.

    Args:
        path: The run's config.yaml.
        overrides: `a.b=value` strings of `--set`.
    Returns:
        The configuration, untouched by the environment; without overrides it is `read_resolved(path)`.
    Raises:
        ConfigError: a setting that decides results, or one that does not exist.
    """
    found = load_config([path], overrides, {})
    changed = differences(read_resolved(path).config, found.config)
    if refused := [name for name in changed if name not in CHANGEABLE]:
        raise ConfigError(
            f"--set {refused[0]} with --resume: results depend on it, so a resumed run keeps it; start a new "
            f"run to change it. These can change: {', '.join(CHANGEABLE)}"
        )
    return found


def unused_changes(path: Path, wanted: RunConfig) -> list[str]:
    """What `--set` asks of a run that is finished, where nothing is left to change, as one warning.

    Args:
        path: The run's config.yaml.
        wanted: `resumed_config` of the same run with the changes.
    Returns:
        No text if nothing differs, else one that names each setting with both values.
    """
    has = read_resolved(path).config
    old, new = (dict(leaves(config.model_dump(mode="json"))) for config in (has, wanted))
    told = [f"{name} stays {old.get(name)!r}, not {new.get(name)!r}" for name in differences(has, wanted)]
    if not told:
        return []
    again = "start a new run to use other settings; `diffexpo track` tells trackers of a finished one"
    return [f"{path.parent} is finished, so settings change nothing: {'; '.join(told)}. {again}"]


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """Dotted paths of the settings that differ."""
    old, new = (dict(leaves(config.model_dump(mode="json"))) for config in (before, after))
    names, absent = old.keys() | new.keys(), object()
    return sorted(name for name in names if old.get(name, absent) != new.get(name, absent))
