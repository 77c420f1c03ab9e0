"""diffexpo aligns text-to-image diffusion and flow-matching models with preferences, online.

The names below load on first use: `import diffexpo` imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "RunConfig": "diffexpo.config",
    "load_config": "diffexpo.config",
    "DiffexpoError": "diffexpo.errors",
    "Conditioning": "diffexpo.types",
    "LossOutput": "diffexpo.types",
    "PairBatch": "diffexpo.types",
    "Policy": "diffexpo.types",
    "Prompt": "diffexpo.types",
    "Reward": "diffexpo.types",
    "Path": "diffexpo.diffusion",
    "prediction_error": "diffexpo.diffusion",
    "sample": "diffexpo.diffusion",
    "diffusion_dpo_loss": "diffexpo.algorithms.diffusion_dpo",
    "exploration_bonus": "diffexpo.algorithms.expo",
    "expo_loss": "diffexpo.algorithms.expo",
    "simpo_loss": "diffexpo.algorithms.diffusion_dpo",
    "load_policy": "diffexpo.policies.base",
    "load_rewards": "diffexpo.rewards.base",
    "Store": "diffexpo.data.store",
    "best_and_worst": "diffexpo.online",
    "linear_decay": "diffexpo.online",
    "vendi_score": "diffexpo.evaluation",
    "win_rate": "diffexpo.evaluation",
}

__all__ = ["__version__"] + list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(
            f"module 'diffexpo' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
