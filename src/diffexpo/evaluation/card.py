"""The model card of an export: README.md with the front matter that the hub reads, and a picture before and
after.

Everything in it comes from the run's files: settings, the evaluation's numbers with their intervals, pictures
chosen by rule. What was not measured is said to be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import diffexpo
from diffexpo.config import RunConfig
from diffexpo.config.citations import citations
from diffexpo.config.families import FAMILIES, find_checkpoint
from diffexpo.config.papers import bibtex
from diffexpo.config.schema import SamplerConfig
from diffexpo.evaluation.grid import picture_grid, save_grid
from diffexpo.evaluation.records import RunRecord, load_run
from diffexpo.evaluation.summary import Summary, summarise

CARD, GRID = "README.md", "before_after.png"
EMBEDDED_LICENCE = "apache-2.0"
# Schedulers of diffusers that draw as the sampler does.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}


@dataclass(frozen=True)
class Exported:
    """What lies in the folder: kind, name of the pipeline's class, files by name, components that are loaded
    as None, the arguments of the pipeline's call, and the folder or hub id of the base model."""

    kind: str
    pipeline_class: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    arguments: Mapping[str, object]
    base: str


def write_card(run_dir: Path, folder: Path, config: RunConfig, exported: Exported) -> Path:
    """Write README.md and, if the run was evaluated, before_after.png.

    Args:
        run_dir: The run.
        folder: Where the export lies.
        config: Its settings.
        exported: What was exported.
    Returns:
        Path of the card. Its Python block loads the export in plain diffusers when run in its folder.
    """
    record = load_run(run_dir)
    summary = summarise(record)
    has_grid = _write_grid(record, summary, config, folder / GRID)
    front = yaml.safe_dump(_front_matter(config, exported), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---\n",
        f"# {config.name}\n",
        _summary(config, exported),
        _use(config, exported),
        _pictures(config, summary) if has_grid else "",
        _results(record, summary),
        _training(config),
        _limits(config),
        _cite(config),
    ]
    path = folder / CARD
    path.write_text("\n".join(section for section in sections if section), encoding="utf-8")
    return path


def licence_of(path: str) -> str | None:
    """Identifier or name of the base model's licence, as far as its name tells; `licence_of("x/sd15")` is
    "creativeml-openrail-m"."""
    if path.startswith("emoji:"):
        return EMBEDDED_LICENCE
    found = find_checkpoint(path)
    return found[1].licence if found else None


def _front_matter(config: RunConfig, exported: Exported) -> dict[str, object]:
    path, licence = config.model.path, licence_of(config.model.path)
    front: dict[str, object] = {}
    if _is_hub_id(path):
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


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path) is not None and not Path(path).exists()


def _summary(config: RunConfig, exported: Exported) -> str:
    what = "LoRA for" if exported.kind == "lora" else "fine-tuned version of"
    rewards = [reward for reward in config.rewards if reward.role == "train"]
    judged = " and ".join(_scorer(reward.name, reward.type) for reward in rewards)
    learned = f" against {judged}" if judged else ""
    licence = licence_of(config.model.path)
    inherited = f"`{licence}`" if licence else "not known here: see the base model"
    return (
        f"A {what} `{config.model.path}`, trained with {config.algorithm.title}{learned} by "
        f"diffexpo "
        f"{diffexpo.__version__}.\n\nLicence of the base model, which this inherits: {inherited}.\n"
    )


def _scorer(name: str, kind: str) -> str:
    return f"`{name}`" if name == kind else f"`{name}` ({kind})"


def _use(config: RunConfig, exported: Exported) -> str:
    """Python that loads the export, and the settings it was evaluated with."""
    sampler, name = config.evaluation.sampler, exported.pipeline_class
    absent = "".join(f", {component}=None" for component in exported.left_out)
    lora = exported.kind == "lora"
    has_loader = "pytorch_lora_weights.safetensors" in exported.files
    lines = [f"from diffusers import {name}"]
    if lora and not has_loader:
        lines.append("from peft import PeftModel")
    lines += ["", f"pipeline = {name}.from_pretrained({exported.base if lora else '.'!r}{absent})"]
    if lora and has_loader:
        lines.append('pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")')
    elif lora:
        lines.append(
            'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, ".").get_base_model()'
        )
    lines += [
        "image = pipeline(",
        '    "a photo of a cat",',
        f"    num_inference_steps={sampler.steps},",
        f"    guidance_scale={_pipeline_guidance(config, exported):g},",
        *(f"    {key}={value!r}," for key, value in exported.arguments.items()),
        ").images[0]",
    ]
    kohya = "kohya_lora.safetensors"
    comfy = f"ComfyUI and kohya's tools read `{kohya}`" if kohya in exported.files else ""
    if lora and has_loader and not comfy:
        comfy = "ComfyUI reads the same file (`transformer.*` names)"
    return "\n".join(
        [
            "## Use\n",
            f"In the folder of these files{', or with their hub id in place of the dot' if lora else ''}:\n",
            "```python",
            *lines,
            "```\n",
            f"{_settings(sampler)}{' LoRA strength 1.' if lora else ''}{f' {comfy}.' if comfy else ''}\n",
        ]
    )


def _pipeline_guidance(config: RunConfig, exported: Exported) -> float:
    """What the pipeline calls guidance: for some families (FLUX) the number that the network is fed."""
    if FAMILIES[exported.pipeline_class].is_fed_guidance:
        return config.model.guidance_embedding
    return config.evaluation.sampler.guidance


def _settings(sampler: SamplerConfig) -> str:
    scheduler = SCHEDULERS.get(sampler.name)
    how = f" (`{scheduler}`)" if scheduler else ""
    eta = f", eta {sampler.eta:g}" if sampler.name == "ddim" else ""
    return f"Evaluated with {sampler.name}{how}, {sampler.steps} steps, guidance {sampler.guidance:g}{eta}."


def _pictures(config: RunConfig, summary: Summary) -> str:
    count = min(config.evaluation.grid_prompts, config.evaluation.num_prompts)
    return (
        f"## Before and after\n\n![Base model left, {summary.final} right]({GRID})\n\n"
        f"The first {count} evaluation prompts in keyed order, not chosen by hand, the same noise on both "
        f"sides.\n"
    )


def _results(record: RunRecord, summary: Summary) -> str:
    if not record.suites:
        return "## Results\n\nThis run was not evaluated.\n"
    settings = record.config.get("evaluation", {})
    said = (
        f"{settings.get('num_prompts')} prompts never trained on (`{settings.get('prompts')}`), "
        f"images of each: {settings.get('images_per_prompt', 1)}, the same seeds for both; 95% intervals, "
        f"bootstrap over prompts.\n"
    )
    lines = [
        "## Results\n",
        said,
        "| measure | used in training | base | this model |",
        "|---|---|---|---|",
    ]
    suite = next(iter(record.suites.values()))
    final = summary.final or "base"
    for scorer, versions in summary.rewards.items():
        trained = "yes" if suite.roles.get(scorer) == "train" else "no"
        base, last = (_interval(versions.get(version)) for version in ("base", final))
        lines.append(f"| {_describe(scorer, suite.scorers)} | {trained} | {base} | {last} |")
    wins = summary.wins.get(final)
    if wins is not None:
        rate = _interval((wins.rate, wins.low, wins.high), percent=True)
        lines.append(f"| share of wins against the base under `{summary.judge}` | no | 50% | {rate} |")
    if final in summary.kl:
        lines.append(f"| KL to the base, nats per image | - | 0 | {_interval(summary.kl[final])} |")
    if "base" in summary.vendi or final in summary.vendi:
        vendi = [_interval(summary.vendi.get(version)) for version in ("base", final)]
        lines.append(f"| Vendi score (diversity within a prompt) | - | {vendi[0]} | {vendi[1]} |")
    alarms = [f"- {alarm.message}" for alarm in summary.alarms]
    return "\n".join([*lines, "", *(["Alarms of the run:\n", *alarms, ""] if alarms else [])])


def _describe(scorer: str, scorers: Mapping[str, str]) -> str:
    """Name and unit of a scorer; its version is a long fingerprint."""
    _, _, scale = scorers.get(scorer, "").partition("; ")
    return f"`{scorer}`{f', {scale}' if scale else ''}"


def _interval(estimate: Sequence[float] | None, *, percent: bool = False) -> str:
    if estimate is None:
        return "not measured"
    middle, low, high = (f"{100 * value:.1f}%" if percent else f"{value:.4g}" for value in estimate)
    return f"{middle} [{low}, {high}]"


def _training(config: RunConfig) -> str:
    rows = [f"| `{name}` | `{value}` |" for name, value in _told(config)]
    return "\n".join(["## Training\n", "| setting | value |", "|---|---|", *rows, ""])


def _told(config: RunConfig) -> Iterator[tuple[str, object]]:
    """The settings that say what was done: the method's own, the loop's and the optimiser's."""
    yield "seed", config.seed
    for name, value in config.algorithm.model_dump(mode="json").items():
        yield f"algorithm.{name}", value
    if config.tuning.kind == "lora":
        yield "tuning.lora.rank", config.tuning.lora.rank
        yield "tuning.lora.alpha", config.tuning.lora.alpha or config.tuning.lora.rank
    explore, training = config.explore, config.training
    for name in ("iterations", "prompts_per_iteration", "images_per_prompt", "agents"):
        yield f"explore.{name}", getattr(explore, name)
    sampler = explore.sampler
    yield "explore.sampler", f"{sampler.name}, {sampler.steps} steps, guidance {sampler.guidance:g}"
    for name in ("steps", "batch_size", "learning_rate", "warmup_fraction", "ema_decay", "mixed_precision"):
        yield f"training.{name}", getattr(training, name)
    yield "prompts.source", config.prompts.source
    yield "offline.source", config.offline.source
    for reward in config.rewards:
        yield f"reward {reward.name}", f"{reward.type}, weight {reward.weight:g}, {reward.role}"


def _limits(config: RunConfig) -> str:
    trained = ", ".join(f"`{reward.name}`" for reward in config.rewards if reward.role == "train")
    what = f"It prefers what {trained} prefers, its mistakes included." if trained else ""
    return (
        f"## Limits\n\n{what} Faults and biases of the base model remain; whether this model is safer or "
        f"less safe than it was not "
        f"examined.\n"
    )


def _cite(config: RunConfig) -> str:
    found = citations(config)
    lines = ["## Citations\n", *(f"- {line}" for line in found.as_text().splitlines()), ""]
    entries = "\n\n".join(bibtex(one.work) for one in found.known)
    return "\n".join([*lines, "```bibtex", entries, "```", ""])


def _write_grid(record: RunRecord, summary: Summary, config: RunConfig, path: Path) -> bool:
    """Base and last version side by side; False if the run has not both."""
    base, last = record.suites.get("base"), record.suites.get(summary.final or "")
    if base is None or last is None:
        return False
    count = min(config.evaluation.grid_prompts, len(base.prompts), len(last.prompts))
    rows = [[base.picture(index), last.picture(index)] for index in range(count)]
    labels = [prompt.text for prompt in base.prompts[:count]]
    side = max(128, min(256, base.images.shape[1]))
    save_grid(path, picture_grid(rows, labels, ["base", config.name], tile=side))
    return True
