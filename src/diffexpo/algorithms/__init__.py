"""Training methods, one a file: a pure function on (B,) tensors and a small class that feeds it."""

from diffexpo.algorithms.awm import Awm, awm_log_prob, awm_loss
from diffexpo.algorithms.d3po import D3po, d3po_loss, transition_margin
from diffexpo.algorithms.ddpo import (
    Ddpo,
    clipped_surrogate,
    ddpo_sf_loss,
    ppo_clip_loss,
    probability_ratio,
)
from diffexpo.algorithms.dgpo import Dgpo, dgpo_loss, dgpo_margin
from diffexpo.algorithms.diffusion_dpo import (
    DiffusionDpo,
    diffusion_dpo_loss,
    pair_margin,
    simpo_loss,
)
from diffexpo.algorithms.diffusion_kto import DiffusionKto, diffusion_kto_loss, kto_baseline
from diffexpo.algorithms.diffusion_nft import DiffusionNft, nft_loss, nft_optimality, old_policy_decay
from diffexpo.algorithms.dpok import Dpok, dpok_kl, dpok_policy_loss, dpok_value_loss
from diffexpo.algorithms.expo import Expo, exploration_bonus, expo_loss
from diffexpo.algorithms.flow_grpo import FlowGrpo, flow_grpo_kl, guard_loss, guard_ratio, mix_grpo_window
from diffexpo.algorithms.improvement import (
    Improvement,
    ImprovementDpo,
    improvement_rows,
    improvement_tasks,
)
from diffexpo.algorithms.mapo import Mapo, mapo_loss, mapo_margin, mapo_score
from diffexpo.algorithms.prdp import Prdp, prdp_loss, predicted_reward_difference
from diffexpo.algorithms.rwr import Rwr, rwr_weights
from diffexpo.algorithms.safeguards import auto_beta, safeguard_scale, safeguarded_loser
from diffexpo.algorithms.sft import Sft, sft_loss
from diffexpo.algorithms.spin import Spin, spin_loss
from diffexpo.algorithms.spo import Spo, spo_loss, spo_min_margin
from diffexpo.types import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "expo": Expo,
    "diffusion_dpo": DiffusionDpo,
    "spin": Spin,
    "improvement_dpo": ImprovementDpo,
    "mapo": Mapo,
    "sft": Sft,
    "diffusion_kto": DiffusionKto,
    "rwr": Rwr,
    "diffusion_nft": DiffusionNft,
    "awm": Awm,
    "dgpo": Dgpo,
    "ddpo": Ddpo,
    "dpok": Dpok,
    "d3po": D3po,
    "spo": Spo,
    "prdp": Prdp,
    "flow_grpo": FlowGrpo,
}

__all__ = [
    "ALGORITHMS",
    "Awm",
    "D3po",
    "Ddpo",
    "Dgpo",
    "DiffusionDpo",
    "DiffusionKto",
    "DiffusionNft",
    "Dpok",
    "Expo",
    "FlowGrpo",
    "Improvement",
    "ImprovementDpo",
    "Mapo",
    "Prdp",
    "Rwr",
    "Sft",
    "Spin",
    "Spo",
    "auto_beta",
    "awm_log_prob",
    "awm_loss",
    "clipped_surrogate",
    "d3po_loss",
    "ddpo_sf_loss",
    "dgpo_loss",
    "dgpo_margin",
    "diffusion_dpo_loss",
    "diffusion_kto_loss",
    "dpok_kl",
    "dpok_policy_loss",
    "dpok_value_loss",
    "exploration_bonus",
    "expo_loss",
    "flow_grpo_kl",
    "guard_loss",
    "guard_ratio",
    "improvement_rows",
    "improvement_tasks",
    "kto_baseline",
    "mapo_loss",
    "mapo_margin",
    "mapo_score",
    "mix_grpo_window",
    "nft_loss",
    "nft_optimality",
    "old_policy_decay",
    "pair_margin",
    "ppo_clip_loss",
    "prdp_loss",
    "predicted_reward_difference",
    "probability_ratio",
    "rwr_weights",
    "safeguard_scale",
    "safeguarded_loser",
    "sft_loss",
    "simpo_loss",
    "spin_loss",
    "spo_loss",
    "spo_min_margin",
    "transition_margin",
]
