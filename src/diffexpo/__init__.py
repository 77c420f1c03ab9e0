"""diffexpo aligns text-to-image diffusion and flow-matching models with preferences, online.

The names below load on first use: `import diffexpo` imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# Public names by the module that defines them.
_NAMES = {
    "diffexpo.config": ("RunConfig", "load_config"),
    "diffexpo.errors": ("DiffexpoError",),
    "diffexpo.types": ("Conditioning", "LossOutput", "PairBatch", "Policy", "Prompt", "Reward"),
    "diffexpo.diffusion": ("Path", "prediction_error", "sample"),
    "diffexpo.algorithms.diffusion_dpo": ("diffusion_dpo_loss", "simpo_loss"),
    "diffexpo.algorithms.expo": ("exploration_bonus", "expo_loss"),
    "diffexpo.running": ("Run", "compare", "load_policy", "load_rewards", "open_run", "run"),
    "diffexpo.data.store": ("Store",),
    "diffexpo.online": ("best_and_worst", "linear_decay"),
    "diffexpo.evaluation": ("vendi_score", "win_rate"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__"] + list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(
            f"module 'diffexpo' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
