"""The model card of an export: README.md with the front matter that the hub reads, and a sheet of images.

Everything in it comes from the run's files: settings, the evaluation's numbers with their intervals, images
chosen by rule. It says what was not measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

import diffexpo
from diffexpo.config import RunConfig
from diffexpo.config.citations import citations
from diffexpo.config.families import FAMILIES, find_checkpoint
from diffexpo.config.worlds import world_of
from diffexpo.evaluation.grid import save_comparison
from diffexpo.evaluation.records import RunRecord, load_run
from diffexpo.evaluation.summary import Summary, summarise
from diffexpo.evaluation.templates import template

CARD, GRID = "README.md", "before_after.png"
EMBEDDED_LICENCE = "apache-2.0"
# Schedulers of diffusers that draw as the sampler does, and their settings besides those of the base model.
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", ""),
    "ddim": ("DDIMScheduler", ""),
    "dpmpp": ("DPMSolverMultistepScheduler", ', algorithm_type="dpmsolver++"'),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", ""),
}


@dataclass(frozen=True)
class Exported:
    """What lies in the folder: `left_out` components are loaded as None, `arguments` are of the pipeline's
    call, `base` is the base model's folder or hub id. `version` is the iterate, as evaluations name it; None:
    the run's result."""

    kind: str
    pipeline_class: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    arguments: Mapping[str, object]
    base: str
    version: str | None = None


def write_card(run_dir: Path, folder: Path, config: RunConfig, exported: Exported) -> Path:
    """Write README.md to the export's folder and, if the run was evaluated, before_after.png.

    Returns the card's path; its Python block loads the export in plain diffusers when run in its folder.
    """
    # What the pipeline calls guidance: for some families (FLUX) the number that the network is fed.
    is_fed = FAMILIES[exported.pipeline_class].is_fed_guidance
    guidance = config.model.guidance_embedding if is_fed else config.evaluation.sampler.guidance
    record, found = load_run(run_dir), citations(config)
    summary, sampler = summarise(record, exported.version), config.evaluation.sampler
    arguments = dict(exported.arguments) | (
        {"eta": sampler.eta} if sampler.name == "ddim" and sampler.eta else {}
    )
    text = template("card.md.j2").render(
        front=yaml.safe_dump(_front_matter(config, exported), sort_keys=False, allow_unicode=True),
        config=config,
        exported=exported,
        record=record,
        summary=summary,
        method=config.algorithm.title,
        trained=[reward for reward in config.rewards if reward.role == "train"],
        licence=licence_of(config.model.path),
        version=diffexpo.__version__,
        guidance=guidance,
        scheduler=SCHEDULERS.get(sampler.name),
        arguments=arguments,
        base_name=shareable(config.model.path),
        base_in_package=config.model.path if world_of(config.model.path) else None,
        base=relative_base(exported.base, folder),
        grid=GRID if _write_grid(record, summary, config, folder / GRID) else None,
        settings_told=list(_told(config)),
        cited=found.as_text().replace(config.model.path, shareable(config.model.path)).splitlines(),
        entries="\n\n".join(one.work.entry for one in found.known),
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder / CARD


def shareable(path: str) -> str:
    """A path as a card may tell it: of an absolute one its last part, which says nothing of the machine."""
    return Path(path).name if Path(path).expanduser().is_absolute() else path


def relative_base(base: str, folder: Path) -> str:
    """The base model as code in the export's folder names it: a hub id, or a path from there."""
    return os.path.relpath(base, folder) if Path(base).is_absolute() else base


def licence_of(path: str) -> str | None:
    """The base model's licence as far as its name tells: "creativeml-openrail-m" of "x/sd15"."""
    if world_of(path):
        return EMBEDDED_LICENCE
    found = find_checkpoint(path)
    return found[1].licence if found else None


def _front_matter(config: RunConfig, exported: Exported) -> dict[str, object]:
    path, licence = config.model.path, licence_of(config.model.path)
    front: dict[str, object] = {}
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path) and not Path(path).exists():
        front["base_model"] = path
        front["base_model_relation"] = "adapter" if exported.kind == "lora" else "finetune"
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if licence is not None and re.fullmatch(r"[a-z0-9.+-]+", licence):
        front["license"] = licence
    elif licence is not None:
        front |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")}
    kind = ["lora"] if exported.kind == "lora" else []
    tags = ["text-to-image", "diffusers", *kind, "preference-optimization", "diffexpo"]
    return front | {"tags": [*tags, config.algorithm.type.replace("_", "-")]}


def _told(config: RunConfig) -> Iterator[tuple[str, object]]:
    """The settings that say what was done: the method's own, the loop's and the optimiser's."""
    yield "seed", config.seed
    for name, value in config.algorithm.model_dump(mode="json").items():
        yield f"algorithm.{name}", value
    if config.tuning.kind == "lora":
        yield "tuning.lora.rank", config.tuning.lora.rank
        yield "tuning.lora.alpha", config.tuning.lora.alpha or config.tuning.lora.rank
    if config.tuning.start is not None:
        yield "tuning.start", shareable(config.tuning.start)
    explore, training = config.explore, config.training
    for name in ("iterations", "prompts_per_iteration", "images_per_prompt", "agents"):
        yield f"explore.{name}", getattr(explore, name)
    sampler = explore.sampler
    yield "explore.sampler", f"{sampler.name}, {sampler.steps} steps, guidance {sampler.guidance:g}"
    for name in ("steps", "batch_size", "learning_rate", "warmup_fraction", "ema_decay", "mixed_precision"):
        yield f"training.{name}", getattr(training, name)
    yield "prompts.source", shareable(config.prompts.source)
    yield "offline.source", None if config.offline.source is None else shareable(config.offline.source)
    for reward in config.rewards:
        yield f"reward {reward.name}", f"{reward.type}, weight {reward.weight:g}, {reward.role}"


def _write_grid(record: RunRecord, summary: Summary, config: RunConfig, path: Path) -> bool:
    """Base and last version side by side; False if the run has not both."""
    base, last = record.suites.get("base"), record.suites.get(summary.final or "")
    if base is None or last is None:
        return False
    side = max(128, min(256, base.images.shape[1]))
    prompts = base.prompts[: min(config.evaluation.grid_prompts, len(last.prompts))]
    if not prompts:
        return False
    save_comparison(path, [("base", base), (config.name, last)], prompts, tile=side)
    return True
