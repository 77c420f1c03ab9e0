"""What a run used that should be cited, read from its settings alone. Imports without torch.

Each rule below looks at one part of the settings and names works of `papers.WORKS`. A model or scorer that
the rules do not know is listed by name, so that its user looks for its own reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffexpo.config.algorithms import (
    DdpoConfig,
    DiffusionDpoConfig,
    ExpoConfig,
    FlowGrpoConfig,
    SftConfig,
    SpoConfig,
    TrajectoryConfig,
)
from diffexpo.config.families import FAMILIES, Family, family_of_name
from diffexpo.config.names import method_name
from diffexpo.config.papers import WORKS, Work, bibtex, readable

if TYPE_CHECKING:
    from diffexpo.config.schema import RewardConfig, RunConfig, SamplerConfig

EMBEDDED = "emoji:"
OURS = (EMBEDDED, "prompts:")

# Whose training loss supervised fine-tuning is: that of the model at hand.
NOISE_LOSS, FLOW_LOSS = "ho2020ddpm", "liu2022rectifiedflow"
METHODS: dict[str, tuple[str, ...]] = {
    "expo": ("zhan_expo", "wallace2024diffusiondpo"),
    "diffusion_dpo": ("wallace2024diffusiondpo",),
    "improvement_dpo": ("improvement_model", "wallace2024diffusiondpo", "brooks2023instructpix2pix"),
    "spin": ("yuan2024spin",),
    "mapo": ("hong2024mapo",),
    "sft": (NOISE_LOSS,),
    "diffusion_kto": ("li2024diffusionkto",),
    "rwr": ("peters2007rwr", "lee2023aligning", "black2024ddpo"),
    "diffusion_nft": ("zheng2026diffusionnft",),
    "awm": ("xue2025awm",),
    "dgpo": ("luo2025dgpo",),
    "ddpo": ("black2024ddpo",),
    "dpok": ("fan2023dpok",),
    "d3po": ("yang2024d3po",),
    "spo": ("liang2024spo",),
    "prdp": ("deng2024prdp",),
    "flow_grpo": ("liu2025flowgrpo", "schulman2017ppo"),
}
KINDS = {
    "hinge": "zhao2023slic",
    "ipo": "azar2024ipo",
    "cdpo": "mitchell2023cdpo",
    "robust": "chowdhury2024robust",
    "simpo": "meng2024simpo",
}
SAMPLERS = {
    "ddpm": "ho2020ddpm",
    "ddim": "song2020ddim",
    "dpmpp": "lu2022dpmsolverpp",
    "flow_euler": "liu2022rectifiedflow",
}
FLOW_SDES = {"flow_grpo": "liu2025flowgrpo", "dance": "xue2025dancegrpo", "cps": "wang2025cps"}
# Types that are not here stand for no published work: a function of the user's own, or a way to reach another
# scorer.
REWARDS: dict[str, tuple[str, ...]] = {
    "clip": ("radford2021clip",),
    "pickscore": ("kirstain2023pickapic",),
    "hpsv2": ("wu2023hpsv2",),
    "hpsv2.1": ("wu2023hpsv2",),
    "imagereward": ("xu2023imagereward",),
    "aesthetic": ("schuhmann2022laion", "radford2021clip"),
    "jpeg_compressibility": ("black2024ddpo",),
    "jpeg_incompressibility": ("black2024ddpo",),
    "ocr": ("rapidocr",),
    "brisque": ("mittal2012brisque",),
    "open_nsfw": ("open_nsfw",),
    "implicit": ("wallace2024diffusiondpo",),
    "denoising": ("li2023diffusionclassifier",),
}
OFFLINE_FORMATS = {"hpd": "wu2023hpsv2", "imagerewarddb": "xu2023imagereward"}


@dataclass(frozen=True)
class Citation:
    """A work and everything that a run used it for."""

    work: Work
    purposes: tuple[str, ...]


@dataclass(frozen=True)
class Citations:
    """What to cite, in the order method, sampler, model, rewards, data, metrics; and what only its user can
    cite."""

    known: tuple[Citation, ...]
    unknown: tuple[str, ...]

    def as_text(self) -> str:
        """One line a work: what it was used for, and the work."""
        lines = [f"{'; '.join(one.purposes)}: {readable(one.work)}" for one in self.known]
        return "\n".join([*lines, *(f"{what}: not known here, cite its own source" for what in self.unknown)])

    def as_bibtex(self) -> str:
        """One entry a work; what it was used for stands above it, outside the entry."""
        entries = [f"% {'; '.join(one.purposes)}\n{bibtex(one.work)}" for one in self.known]
        return "\n\n".join([*entries, *(f"% {what}: not known here" for what in self.unknown)])


Uses = Iterator[tuple[str, str | None]]
"""(what it was used for, key of the work; None if no work is known)."""


def citations(config: RunConfig) -> Citations:
    """The works that a run used, each once, with everything that it was used for.

    Args:
        config: Settings of the run; a model that is a folder is asked for its pipeline class.
    Returns:
        Citations; of the default settings the first is EXPO's paper and the last diffexpo itself.
    """
    uses: dict[str, list[str]] = {}
    unknown: list[str] = []
    for rule in (_method, _options, _agents, _samplers, _model, _rewards, _data, _metrics, _itself):
        for purpose, key in rule(config):
            found = unknown if key is None else uses.setdefault(key, [])
            if purpose not in found:
                found.append(purpose)
    known = tuple(Citation(WORKS[key], tuple(purposes)) for key, purposes in uses.items())
    return Citations(known, tuple(unknown))


def _method(config: RunConfig) -> Uses:
    algorithm = config.algorithm
    name = f"method {method_name(algorithm.type)}"
    for key in METHODS.get(algorithm.type, ()):
        yield name, FLOW_LOSS if key == NOISE_LOSS and _is_flow(config) else key
    if algorithm.type not in METHODS:
        yield name, None
    if isinstance(algorithm, SpoConfig) and algorithm.judge and not algorithm.judge.startswith(EMBEDDED):
        yield f"step-aware judge {algorithm.judge}", None
    if isinstance(algorithm, SftConfig) and algorithm.keep == "best" and _collects(config):
        yield "best of n (RAFT)", "dong2023raft"
    if isinstance(algorithm, DdpoConfig) and algorithm.estimator == "importance_sampling":
        yield "clipped ratio", "schulman2017ppo"
    if isinstance(algorithm, FlowGrpoConfig) and algorithm.ratio == "guard":
        yield "ratio of GRPO-Guard", "wang2025grpoguard"
    if isinstance(algorithm, FlowGrpoConfig) and algorithm.window is not None:
        yield "window of MixGRPO", "li2025mixgrpo"
    if config.baseline.offline_dpo:
        yield "baseline offline DPO", "wallace2024diffusiondpo"


def _options(config: RunConfig) -> Uses:
    """Parts that come from another paper than the method's."""
    algorithm = config.algorithm
    if isinstance(algorithm, DiffusionDpoConfig):
        if algorithm.kind in KINDS:
            yield f"loss {algorithm.kind}", KINDS[algorithm.kind]
        if algorithm.safeguard:
            yield "safeguard of winners", "fu2025sdpo"
        if algorithm.auto_beta:
            yield "automatic beta", "simpletuner"
    if config.mixture.kind == "pareto" and sum(reward.role == "train" for reward in config.rewards) > 1:
        yield "comparison under every reward", "yang2024d3po"
    if config.tuning.kind == "lora":
        yield "adapters (LoRA)", "hu2021lora"


def _agents(config: RunConfig) -> Uses:
    algorithm = config.algorithm
    if isinstance(algorithm, ExpoConfig) and config.explore.agents == 2 and _collects(config):
        yield "two agents", "xiong2024iterative"
    if isinstance(algorithm, ExpoConfig) and algorithm.alpha > 0:
        yield "exploration bonus", "zhan_online_rlhf"
        yield "form of the exploration bonus", "chen2025sepopo"


def _samplers(config: RunConfig) -> Uses:
    samplers = {"evaluation": config.evaluation.sampler}
    if _collects(config):
        samplers = {"collection": config.explore.sampler, **samplers}
    for place, sampler in samplers.items():
        yield f"sampler of the {place}", _sampler_work(sampler)
        if sampler.guidance != 1.0:
            yield "guidance", "ho2022guidance"


def _sampler_work(sampler: SamplerConfig) -> str | None:
    return FLOW_SDES.get(sampler.sde) if sampler.name == "flow_sde" else SAMPLERS.get(sampler.name)


def _model(config: RunConfig) -> Uses:
    path = config.model.path
    if path.startswith(EMBEDDED):
        yield (
            f"architecture of {path}",
            "esser2024sd3" if "flow" in path.removeprefix(EMBEDDED) else "rombach2022ldm",
        )
        return
    family = _family_of_folder(Path(path)) or family_of_name(path)
    for key in (None,) if family is None else family.works(path):
        yield f"model {path}", key


def _family_of_folder(folder: Path) -> Family | None:
    """The family behind the class that a pipeline's folder names, if it is one."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return FAMILIES.get(str(index.get("_class_name"))) if isinstance(index, dict) else None


def _rewards(config: RunConfig) -> Uses:
    for reward in config.rewards:
        yield from _reward(reward, "reward")
    for judge in config.evaluation.judges:
        yield from _reward(judge, "judge")


def _reward(reward: RewardConfig, role: str) -> Uses:
    keys: tuple[str | None, ...] = REWARDS.get(reward.type, (None,))
    path = (reward.path or "").lower()
    if reward.type == "vlm" and reward.vlm.mode == "caption":
        yield f"{role} {reward.name} (compared by description)", "black2024ddpo"
        if not (reward.vlm.text_encoder or EMBEDDED).startswith(EMBEDDED):
            yield f"{role} {reward.name} (similarity of texts)", "zhang2020bertscore"
    if reward.type == "clip" and "pickscore" in path:
        keys = ("kirstain2023pickapic", *keys)
    is_ours = path.startswith(EMBEDDED)
    is_named = is_ours or reward.type != "clip" or "pickscore" in path or "clip-vit" in path
    for key in keys:
        where = f" ({reward.type} {reward.path})" if key is None and reward.path else ""
        yield f"{role} {reward.name}{where}", key
    if not is_named:
        yield f"{role} {reward.name} (weights of {reward.path})", None


def _data(config: RunConfig) -> Uses:
    if any(path.startswith(EMBEDDED) for path in _named_files(config)):
        yield "pictures of the emoji world", "noto_emoji"
        yield "pictures of the emoji world", "twemoji"
        yield "captions of the emoji world", "cldr"
    for key, prompts in (("prompts", config.prompts.source), ("held-out prompts", config.evaluation.prompts)):
        if not prompts.startswith(OURS):
            yield f"{key} {prompts}", None
    source = config.offline.source
    if source is not None and not source.startswith(EMBEDDED):
        form = str(vars(config.offline).get("format") or "")
        key = OFFLINE_FORMATS.get(form, "kirstain2023pickapic" if form in ("", "auto", "pickapic") else None)
        what = "data or layout of the offline pairs" if key else "offline pairs"
        yield f"{what} {source}", key


def _named_files(config: RunConfig) -> Iterator[str]:
    """What settings name that may be embedded; the negative prompts were written here and need no
    citation."""
    scorers = [*config.rewards, *config.evaluation.judges]
    paths = [config.model.path, config.prompts.source, config.evaluation.prompts, config.offline.source]
    if isinstance(config.algorithm, SpoConfig):
        paths.append(config.algorithm.judge)
    for path in [*paths, *(scorer.path for scorer in scorers)]:
        if path is not None:
            yield path


def _metrics(config: RunConfig) -> Uses:
    if config.evaluation.vendi_prompts > 0 and config.evaluation.vendi_images > 1:
        yield "diversity (Vendi score)", "friedman2023vendi"


def _itself(config: RunConfig) -> Uses:
    yield "software", "diffexpo"


def _collects(config: RunConfig) -> bool:
    """Whether images are drawn to learn from."""
    return isinstance(config.algorithm, TrajectoryConfig) or config.explore.iterations > 1


def _is_flow(config: RunConfig) -> bool:
    """Whether the model predicts a flow's velocity: only such a model takes the samplers of flows."""
    return config.evaluation.sampler.name.startswith("flow")
