"""Audits: what models draw where a prompt leaves something open, and how much of it is unsafe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffexpo.assembly.actions import load_weights, open_run
from diffexpo.assembly.aliases import named_prompts, resolve
from diffexpo.assembly.folders import result_path
from diffexpo.bounded.images import read_image
from diffexpo.bounded.texts import parse_json, read_json, read_text
from diffexpo.config.audit import AuditConfig
from diffexpo.config.audits import NO_LABELS, read_audit, scorers_of, shipped_audits
from diffexpo.config.iterates import split_iterate
from diffexpo.config.run import RunConfig
from diffexpo.config.schema import EvaluationConfig, ModelConfig, TuningConfig
from diffexpo.config.studies import protocol_to_yaml
from diffexpo.config.worlds import world_of
from diffexpo.errors import ConfigError, DataError, MissingError
from diffexpo.evaluation.audit import Labelled, Scorers, as_tensor, measure_audit
from diffexpo.evaluation.audit_numbers import AUDIT
from diffexpo.evaluation.audit_page import describe_audit, write_audit
from diffexpo.evaluation.records import SuiteResult, is_saved, load_suite, save_suite
from diffexpo.evaluation.suites import Evaluation, choose_prompts
from diffexpo.files import write_json, write_text
from diffexpo.online.keeping import kept_iterate
from diffexpo.online.loop import Console
from diffexpo.policies.base import load_policy
from diffexpo.policies.family import FamilyPolicy
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.images import to_bytes
from diffexpo.training.signals import StopSignal
from diffexpo.types import Prompt
from diffexpo.worlds import embedded_labelled

LABELS, DRAWN = "labels.jsonl", "drawn.json"
_NAME = re.compile(r"\w[\w .,:@-]*")
_LISTS = ("open", "neutral", "provoking")


@dataclass(frozen=True)
class Audited:
    """A model of an audit: its name, what gives it, the version to draw with, and its base's path."""

    name: str
    open: Callable[[], FamilyPolicy]
    version: str
    base: str


def audit(
    models: Sequence[str],
    protocol: str | None,
    overrides: Sequence[str],
    out: Path | None,
    console: Console,
) -> Path:
    """Draw, read and count; images that an earlier audit of the folder drew alike are used again.

    Args:
        models: `[NAME=]SOURCE` each: a run (its base and its result), RUN@2 (an iterate), or a base model.
        protocol: A shipped audit or a YAML file; None: that of the models' embedded world, else
            `occupations`.
        out: Folder; None: `audit` in the run's folder where one run is named, else `audit`.
    Returns:
        The page, `audit.html`; `audit.json` has its numbers.
    Raises:
        MissingError: a model, prompts or labelled images are not there. ConfigError: the protocol is wrong.
        DataError: the labelled images do not do. Interrupted: stopped; what is drawn is kept.
    """
    found = [model for text in models for model in find_models(text)]
    names = [model.name for model in found]
    odd = [name for name in names if not _NAME.fullmatch(name)]
    if odd:
        raise ConfigError(
            f"the model's name {odd[0]!r}: expected letters, digits, spaces and .,@_- as NAME=SOURCE"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"models {', '.join(names)}: two have one name; give them as NAME=SOURCE")
    settings = read_audit(protocol or _default_protocol(found), overrides)
    folder = out or _default_folder(models)
    prompts = {kind: chosen for kind, chosen in _lists(settings).items() if chosen}
    labelled = read_labelled(settings.labelled, settings)
    scorers = _load_scorers(settings)
    write_text(folder / "protocol.yaml", protocol_to_yaml(settings))
    suites: dict[str, dict[str, SuiteResult]] = {kind: {} for kind in prompts}
    with StopSignal() as stop:
        for number, model in enumerate(found):
            policy = model.open()
            if number == 0 and labelled is not None:
                labelled = as_drawn(policy, labelled)
            for kind, chosen in prompts.items():
                place = folder / "images" / model.name / kind
                suites[kind][model.name] = _draw(policy, model, settings, kind, chosen, place, console, stop)
            del policy
    result = measure_audit(settings, scorers, suites, labelled)
    write_audit(folder, settings, result)
    for line in describe_audit(settings, result):
        console.line(line)
    return folder / "audit.html"


def find_models(text: str) -> list[Audited]:
    """The models that an argument names: of a run its base and its result.

    Raises:
        MissingError: a run that is not trained to its end, or has no such iterate, or no such folder.
    """
    name, equals, source = text.partition("=")
    if not equals:
        name, source = "", text
    run, iteration = split_iterate(source)
    run_dir = next(
        (path for path in (Path(run), Path("runs") / run) if (path / "config.yaml").is_file()), None
    )
    if run_dir is not None:
        return _models_of_run(run_dir, iteration, name)
    if world_of(source) is None and not Path(source).expanduser().is_dir() and source.count("/") != 1:
        raise MissingError(
            f"{source}: neither a run (folder or name, RUN@2 for an iterate), nor a model's folder, hub id "
            "or embedded name; expected one of them"
        )
    model = ModelConfig(path=source)

    def load() -> FamilyPolicy:
        return load_policy(model, TuningConfig(), folder_or_id=resolve(source), seed=0)

    return [Audited(name or source.rstrip("/").rpartition("/")[2], load, "base", source)]


def _models_of_run(run_dir: Path, iteration: int | None, name: str) -> list[Audited]:
    from diffexpo.config import read_resolved

    config: RunConfig = read_resolved(run_dir / "config.yaml").config
    result_path(run_dir, config, f"audit {run_dir}", iteration)
    number = kept_iterate(config, run_dir / "store") if iteration is None else iteration

    def load() -> FamilyPolicy:
        policy = open_run(run_dir)[2]
        load_weights(run_dir, policy, number, "current")
        return policy

    title = name or run_dir.name
    result = Audited(title if iteration is None else f"{title}@{number}", load, "current", config.model.path)
    base = Audited(f"{title}, base", load, "base", config.model.path)
    return [base, result] if iteration is None else [result]


def _default_protocol(models: Sequence[Audited]) -> str:
    """The protocol of the world that all models are of."""
    worlds = {world_of(model.base) for model in models}
    world = next(iter(worlds)) if len(worlds) == 1 else None
    return world if world is not None and world in shipped_audits() else "occupations"


def _default_folder(models: Sequence[str]) -> Path:
    run = split_iterate(models[0].rpartition("=")[2])[0]
    for path in (Path(run), Path("runs") / run):
        if len(models) == 1 and (path / "config.yaml").is_file():
            return path / AUDIT
    return Path(AUDIT)


def _lists(settings: AuditConfig) -> dict[str, list[Prompt]]:
    """The prompts of each list that the protocol has a use for."""
    found: dict[str, list[Prompt]] = {}
    if settings.attributes and settings.classifier is not None and settings.prompts is not None:
        found["open"] = named_prompts(settings.prompts, "prompts")
    for kind in _LISTS[1:]:
        source = getattr(settings.safety, kind)
        if source is not None and settings.safety.classifiers:
            listed = named_prompts(source, f"safety.{kind}")
            found[kind] = choose_prompts(listed, settings.safety.num_prompts, settings.seed)
    return found


def _load_scorers(settings: AuditConfig) -> Scorers:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = {key: load_rewards(cards, resolve, device) for key, cards in scorers_of(settings).items()}
    return Scorers(
        classifier=next(iter(loaded["classifier"]), None),
        readable=next(iter(loaded["readable"]), None),
        judges=loaded["judges"],
        safety=loaded["safety.classifiers"],
    )


# Many parameters because a list of images is drawn by all of them.
def _draw(
    policy: FamilyPolicy,
    model: Audited,
    settings: AuditConfig,
    kind: str,
    prompts: Sequence[Prompt],
    folder: Path,
    console: Console,
    stop: StopSignal,
) -> SuiteResult:
    """A model's images of a list, drawn now or, with the same weights and settings, before."""
    count = settings.images_per_prompt if kind == "open" else settings.safety.images_per_prompt
    facts: dict[str, Any] = {
        "weights": policy.weights.fingerprint(model.version),
        "model": policy.fingerprint,
        "prompts": [[prompt.id, prompt.text] for prompt in prompts],
        "images_per_prompt": count,
        "sampler": settings.sampler.model_dump(mode="json"),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }
    if is_saved(folder) and _read(folder / DRAWN) == facts:
        console.line(f"{model.name}, {kind}: {len(prompts) * count} images are there")
        return load_suite(folder)
    how = EvaluationConfig(
        num_prompts=len(prompts),
        images_per_prompt=count,
        sampler=settings.sampler,
        kl_prompts=0,
        vendi_prompts=0,
    )
    drawing = Evaluation(
        policy=policy,
        prompts=prompts,
        settings=how,
        judges=[],
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    batches = -(-len(prompts) * count // settings.batch_size)
    total = batches * (settings.sampler.steps + 1)
    with console.phase(f"draw {kind}, {model.name}", total, "batches") as bar:

        def tick() -> None:
            bar.advance(1)
            stop.check()

        suite = drawing.run(model.version, tick, name=model.name)
    save_suite(suite, folder)
    write_json(folder / DRAWN, facts)
    return suite


def _read(path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def read_labelled(source: str | None, settings: AuditConfig) -> list[Labelled] | None:
    """Images whose values are known: of an embedded world, or of a folder; None where nothing is corrected.

    Raises:
        MissingError: no such folder, or an image is not there. DataError: a line or an image cannot be read.
    """
    if source in (None, NO_LABELS) or settings.classifier is None:
        return None
    assert source is not None
    if world_of(source) is not None:
        found = embedded_labelled(source)
        if found is None:
            raise MissingError(f"labelled = {source}: the world has no labelled images of this name")
        return found
    path = Path(source).expanduser() / LABELS
    if not path.is_file():
        raise MissingError(
            f"labelled = {source}: {path} does not exist; expected a line of JSON for each image, "
            '{"image": file, "prompt": text, attribute: value}'
        )
    return list(_labelled_of(path))


def _labelled_of(path: Path) -> Iterator[Labelled]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = {key: str(value) for key, value in parse_json(line).items()}
            name, text = row.pop("image"), row.pop("prompt")
        except (ValueError, AttributeError, KeyError) as error:
            raise DataError(f'{where}: expected an object with "image" and "prompt" ({error})') from None
        file = (path.parent / name).resolve()
        if not file.is_relative_to(path.parent.resolve()):
            raise DataError(f"{where}: {name} lies outside of the folder; expected a file in it")
        if not file.is_file():
            raise MissingError(f"{where}: {file} does not exist")
        yield read_image(file), Prompt(f"labelled-{number}", text, row.get("category", ""), row)


def as_drawn(policy: FamilyPolicy, labelled: Sequence[Labelled], batch: int = 32) -> list[Labelled]:
    """Labelled images as a model could draw them at best: through its autoencoder, those of its size."""
    with torch.no_grad():
        size = tuple(policy.decode_latents(torch.zeros(1, *policy.latent_shape)).shape[-2:])
        found = list(labelled)
        fits = [number for number, (image, _) in enumerate(found) if image.shape[:2] == size]
        for start in range(0, len(fits), batch):
            rows = fits[start : start + batch]
            images = as_tensor(np.stack([found[row][0] for row in rows]))
            seen = to_bytes(policy.decode_latents(policy.encode_images(images)))
            for row, image in zip(rows, seen, strict=True):
                found[row] = (image, found[row][1])
    return found
