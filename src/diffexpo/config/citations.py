"""What a run used that should be cited, read from its settings alone. Imports without torch.

A model or scorer that the rules below do not know is listed by name, for its user to find its reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffexpo.bounded.texts import read_json
from diffexpo.config.contenders import known_contenders
from diffexpo.config.families import FAMILIES, Family, family_of_name
from diffexpo.config.methods import offline_baseline
from diffexpo.config.papers import WORKS, Work, readable
from diffexpo.config.run import RunConfig
from diffexpo.config.worlds import WORLD_WORKS, world_of

SAMPLERS = {
    "ddpm": "ho2020ddpm",
    "ddim": "song2020ddim",
    "dpmpp": "lu2022dpmsolverpp",
    "flow_euler": "liu2022rectifiedflow",
}
FLOW_SDES = {"flow_grpo": "liu2025flowgrpo", "dance": "xue2025dancegrpo", "cps": "wang2025cps"}
OFFLINE_FORMATS = {
    "auto": "kirstain2023pickapic",
    "pickapic": "kirstain2023pickapic",
    "hpdv2": "wu2023hpsv2",
    "hpdv3": "ma2025hpsv3",
    "imagerewarddb": "xu2023imagereward",
}


@dataclass(frozen=True)
class Citation:
    """A work and everything that a run used it for."""

    work: Work
    purposes: tuple[str, ...]


@dataclass(frozen=True)
class Citations:
    """What to cite, in the order of the rules below, and what only its user can cite."""

    known: tuple[Citation, ...]
    unknown: tuple[str, ...]

    def as_text(self) -> str:
        """One line a work: what it was used for, and the work."""
        lines = [f"{'; '.join(one.purposes)}: {readable(one.work)}" for one in self.known]
        return "\n".join([*lines, *(f"{what}: not known here, cite its own source" for what in self.unknown)])

    def as_bibtex(self) -> str:
        """One entry a work; what it was used for stands above it, outside the entry."""
        entries = [f"% {'; '.join(one.purposes)}\n{one.work.entry}" for one in self.known]
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
    for rule in (_method, _samplers, _model, _rewards, _data, _rest):
        for purpose, key in rule(config):
            found = unknown if key is None else uses.setdefault(key, [])
            if purpose not in found:
                found.append(purpose)
    known = tuple(Citation(WORKS[key], tuple(purposes)) for key, purposes in uses.items())
    return Citations(known, tuple(unknown))


def _method(config: RunConfig) -> Uses:
    """The method, and parts that come from another paper than its own."""
    works = list(config.algorithm.works(config))
    yield from works or [(f"method {config.algorithm.title}", None)]
    if config.baseline.offline_dpo:
        for key in offline_baseline(config.algorithm).papers:
            yield "baseline offline DPO", key
    for contender in known_contenders(config):
        for purpose, work in contender.config.algorithm.works(contender.config):
            yield f"contender {contender.name}: {purpose}", work
    if config.mixture.kind == "pareto" and sum(reward.role == "train" for reward in config.rewards) > 1:
        yield "comparison under every reward", "yang2024d3po"
    if config.tuning.kind == "lora":
        yield "adapters (LoRA)", "hu2021lora"


def _samplers(config: RunConfig) -> Uses:
    samplers = {"evaluation": config.evaluation.sampler}
    if config.algorithm.collects(config):
        samplers = {"collection": config.explore.sampler, **samplers}
    for place, sampler in samplers.items():
        is_sde = sampler.name == "flow_sde"
        yield f"sampler of the {place}", FLOW_SDES.get(sampler.sde) if is_sde else SAMPLERS.get(sampler.name)
        if sampler.guidance != 1.0:
            yield "guidance", "ho2022guidance"


def _model(config: RunConfig) -> Uses:
    path = config.model.path
    if world_of(path):
        is_flow = "flow" in path.partition(":")[2]
        yield f"architecture of {path}", "esser2024sd3" if is_flow else "rombach2022ldm"
        return
    family = _family_of_folder(Path(path)) or family_of_name(path)
    for key in (None,) if family is None else family.works(path):
        yield f"model {path}", key


def _family_of_folder(folder: Path) -> Family | None:
    """The family behind the class that a pipeline's folder names, if it is one."""
    try:
        index = read_json(folder / "model_index.json")
    except (OSError, ValueError):
        return None
    return FAMILIES.get(str(index.get("_class_name"))) if isinstance(index, dict) else None


def _rewards(config: RunConfig) -> Uses:
    for place, scorers in config.scorers.items():
        role = "reward" if place == "rewards" else "judge"
        for scorer in scorers:
            for addition, key in scorer.uses():
                yield f"{role} {scorer.name}{addition}", key


def _data(config: RunConfig) -> Uses:
    named = {world_of(path) for path in _named_files(config)}
    for world, works in WORLD_WORKS.items():
        if world in named:
            yield from works
    for key, prompts in _prompts(config):
        if not (world_of(prompts) or prompts.startswith("prompts:")):
            yield f"{key} {prompts}", None
    source = config.offline.source
    if source is not None and not world_of(source):
        work = OFFLINE_FORMATS.get(config.offline.format)
        what = "data or layout of the offline pairs" if work else "offline pairs"
        yield f"{what} {source}", work


def _prompts(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "prompts", config.prompts.source
    yield "held-out prompts", config.evaluation.prompts
    if config.explore.validation.prompts is not None:
        yield "validation prompts", config.explore.validation.prompts


def _named_files(config: RunConfig) -> Iterator[str]:
    """What settings name that may be embedded; the negative prompts are our own and need no citation."""
    yield from (config.model.path, *(prompts for _, prompts in _prompts(config)))
    scored = [scorer.path for scorers in config.scorers.values() for scorer in scorers]
    others = [config.offline.source, *config.algorithm.named_files, *scored]
    yield from (path for path in others if path is not None)


def _rest(config: RunConfig) -> Uses:
    if config.evaluation.vendi_prompts > 0 and config.evaluation.vendi_images > 1:
        yield "diversity (Vendi score)", "friedman2023vendi"
    yield "software", "diffexpo"
