"""What the papers claim, as comparisons of two arms, and the arms. Read by claims.py; imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass

Settings = tuple[str, ...]
CORRECT = "{name: correct, type: scene_correct, path: 'scenes:checker_heldout'}"
LOOKS = "{name: looks_heldout, type: scene_looks, path: 'scenes:looks_heldout'}"
SCORE = "{name: score, type: scene_score, path: 'scenes:checker_train'}"
SECOND = "{name: looks, type: scene_looks, path: 'scenes:looks_train', weight: 0.5}"
CORE = (
    "baseline.offline_dpo=false",
    "baseline.contenders=[]",
    "explore.keep=last",
    "explore.validation.prompts=null",
    "explore.validation.num_prompts=128",
    "explore.validation.judges=[]",
    "evaluation.prompts=scenes:heldout",
    "evaluation.num_prompts=500",
    f"evaluation.judges=[{CORRECT}, {LOOKS}]",
    "evaluation.every_iteration=false",
    "evaluation.base_guidances=[]",
    "evaluation.vendi_prompts=16",
    "evaluation.vendi_images=6",
    "evaluation.kl_prompts=16",
    "evaluation.grid_prompts=24",
)
"""Of every arm: no rows that another arm already has, and the same evaluation."""
NEGATIVES = (
    "explore.negatives.source=scenes:negatives",
    "explore.negatives.mode=append",
    "explore.negatives.initial=0.3",
    "explore.negatives.agents=both",
)
EACH = ("evaluation.every_iteration=true",)
"""Of arms whose iterates are compared."""
ITERATIONS = "explore.iterations"
TWO_AGENTS = ("explore.agents=2", "explore.images_per_prompt=2")
"""As many images a prompt as EXPO-I has with four."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe with settings. `equals` names the arm whose network evaluations it is given
    by the setting `grows`; None: its cost is its recipe's. `needs` are arms of the same seed that have to be finished first,
    and `{ARM}` in a setting is the folder of such a run. `multiplies` are the factors of its learning rate
    that the search on validation prompts tries."""

    recipe: str = "scenes/expo"
    settings: Settings = ()
    equals: str | None = "expo"
    grows: str = "training.steps"
    needs: tuple[str, ...] = ()
    multiplies: tuple[float, ...] = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Claim:
    """`first` is said to be above `second` in `measure`; each is an arm, or arm@iteration, or arm@0 for the
    base that it starts from. `measure` is a judge, or `vendi` (a prompt's images are more different)."""

    topic: str
    says: str
    first: str
    second: str
    measure: str = "correct"


ARMS: dict[str, Arm] = {
    "expo": Arm(settings=EACH, equals=None),
    "offline": Arm("scenes/dpo_offline"),
    "off_policy": Arm(settings=("explore.iterations=2", "explore.prompts_per_iteration=800", "training.steps=48"), equals=None),
    "hybrid": Arm(settings=("offline.source=scenes:offline",)),
    "two_agents": Arm(settings=TWO_AGENTS),
    "reference_base": Arm(settings=("algorithm.reference=base",)),
    "reference_previous": Arm(settings=("algorithm.reference=previous",)),
    "anchor_none": Arm(settings=("algorithm.anchor_weight=0", "algorithm.anchor_guidance=1")),
    "anchor_base": Arm(settings=("algorithm.anchor_guidance=1",)),
    "guided": Arm(
        settings=("algorithm.anchor_guidance=1", "explore.sampler.guidance=2.5", "evaluation.sampler.guidance=2.5")
    ),
    "distil": Arm("scenes/distil", equals=None, multiplies=(1.0,)),
    "distil_first": Arm(settings=("tuning.start={distil}",), needs=("distil",)),
    "bonus_0": Arm(settings=(*TWO_AGENTS, "algorithm.alpha=0")),
    "bonus_0.1": Arm(settings=(*TWO_AGENTS, "algorithm.alpha=0.1")),
    "bonus_0.3": Arm(settings=(*TWO_AGENTS, "algorithm.alpha=0.3")),
    "bonus_1": Arm(settings=(*TWO_AGENTS, "algorithm.alpha=1")),
    "negatives_constant": Arm(settings=(*NEGATIVES, *EACH, "explore.negatives.schedule=constant")),
    "negatives_decaying": Arm(settings=(*NEGATIVES, *EACH, "explore.negatives.schedule=linear")),
    "several_rewards": Arm(settings=(f"rewards=[{SCORE}, {SECOND}]", "mixture.kind=global")),
    "long": Arm(settings=(*EACH, "explore.iterations=7"), equals=None),
    "short": Arm(settings=("explore.prompts_per_iteration=100", "training.steps=6"), equals=None),
    "implicit": Arm("scenes/expo_implicit", ("rewards.0.path={offline}",), needs=("offline",), grows=ITERATIONS),
    "denoising": Arm("scenes/expo_denoising", grows=ITERATIONS),
    "improvement": Arm("scenes/improvement_dpo", grows=ITERATIONS),
    "spin": Arm("scenes/spin", grows=ITERATIONS),
    "ddpo": Arm("scenes/ddpo", grows=ITERATIONS),
    "ddpo_score_function": Arm(
        "scenes/ddpo",
        ("algorithm.estimator=score_function", "training.steps=1", "training.batch_size=2688"),
        grows=ITERATIONS,
        multiplies=(2.0, 4.0, 8.0),
    ),
    "rwr": Arm("scenes/rwr", grows=ITERATIONS),
    "rwr_sparse": Arm("scenes/rwr", ("algorithm.kind=sparse", "algorithm.percentile=75"), grows=ITERATIONS),
    **{
        name: Arm(f"scenes/{name}", grows=ITERATIONS)
        for name in (
            "raft", "dpo_online", "diffusion_kto", "mapo", "orpo", "awm", "dgpo", "diffusion_nft", "dpok", "d3po", "spo", "prdp",
        )
    },
    "sft": Arm("scenes/sft"),
}  # fmt: skip

CLAIMS = (
    Claim("Online and offline", "pairs drawn during training beat offline pairs at equal cost", "expo", "offline"),
    Claim("Online and offline", "on-policy pairs beat as many off-policy pairs of the same judge", "expo", "off_policy"),
    Claim("Online and offline", "offline and online pairs together beat online pairs alone", "hybrid", "expo"),
    Claim("Online and offline", "offline and online pairs together beat offline pairs alone", "hybrid", "offline"),
    Claim("Online and offline", "offline DPO beats the base", "offline", "offline@0"),
    Claim("Agents and references", "two agents beat one that draws as many images", "two_agents", "expo"),
    Claim("Agents and references", "a reference that follows beats the base as the reference", "expo", "reference_base"),
    Claim("Agents and references", "an average of iterates beats the previous iterate as the reference", "expo", "reference_previous"),
    Claim("Agents and references", "an anchor to the guided base beats none", "expo", "anchor_none"),
    Claim("Agents and references", "an anchor to the guided base beats one to the base", "expo", "anchor_base"),
    Claim("Guidance", "learning guidance and preferences together beats the base's guidance with preferences", "expo", "guided"),
    Claim("Guidance", "guidance distilled first beats learning both together", "distil_first", "expo"),
    Claim("Guidance", "preferences add to distilled guidance", "distil_first", "distil"),
    Claim("The bonus", "alpha = 0.1 beats no bonus", "bonus_0.1", "bonus_0"),
    Claim("The bonus", "alpha = 0.3 beats no bonus", "bonus_0.3", "bonus_0"),
    Claim("The bonus", "alpha = 1 beats no bonus", "bonus_1", "bonus_0"),
    Claim("The bonus", "alpha = 0.3 makes a prompt's images more different", "bonus_0.3", "bonus_0", "vendi"),
    Claim("Negative prompts", "a decaying rate helps in the first collection", "negatives_decaying@2", "expo@2"),
    Claim("Negative prompts", "a decaying rate beats no negative prompts", "negatives_decaying", "expo"),
    Claim("Negative prompts", "a decaying rate beats a constant one", "negatives_decaying", "negatives_constant"),
    Claim("Several rewards", "looks as a second reward raises looks", "several_rewards", "expo", "looks_heldout"),
    Claim("Several rewards", "looks as a second reward raises correctness too", "several_rewards", "expo"),
    Claim("More iterations", "a second collection helps", "long@3", "long@2"),
    Claim("More iterations", "two more help", "long@5", "long@3"),
    Claim("More iterations", "and two more", "long@7", "long@5"),
    Claim("More iterations", "a quarter of the prompts and steps beats offline DPO", "short", "offline"),
    Claim("Without an external reward", "the implicit reward of offline DPO as the judge beats offline DPO", "implicit", "offline"),
    Claim("Without an external reward", "the denoising error as the judge beats the base", "denoising", "denoising@0"),
    Claim("Improvement model", "DPO on improved images beats the base", "improvement", "improvement@0"),
    Claim("Improvement model", "DPO on improved images beats offline DPO", "improvement", "offline"),
    Claim("Improvement model", "DPO on improved images beats SPIN", "improvement", "spin"),
    Claim("Policy gradients", "DDPO beats the base", "ddpo", "ddpo@0"),
    Claim("Policy gradients", "importance sampling beats the score function", "ddpo", "ddpo_score_function"),
    Claim("Policy gradients", "DDPO beats reward-weighted regression", "ddpo", "rwr"),
    Claim("Policy gradients", "DDPO beats sparse reward-weighted regression", "ddpo", "rwr_sparse"),
    *(
        Claim("Every method", f"{name} beats the base", name, f"{name}@0")
        for name in (
            "expo", "sft", "raft", "dpo_online", "diffusion_kto", "mapo", "orpo", "spin", "rwr", "awm", "dgpo", "diffusion_nft", "dpok",
            "d3po", "spo", "prdp",
        )
    ),
)  # fmt: skip
