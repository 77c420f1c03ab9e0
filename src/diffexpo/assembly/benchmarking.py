"""`diffexpo evaluate`: models drawn and judged on one suite, what is missing only, by one process or many."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from diffexpo.assembly.aliases import resolve
from diffexpo.assembly.entries import check_lora, identity, opened, refuse_trained
from diffexpo.assembly.evaluating import vendi_embedder
from diffexpo.assembly.measuring import diversities, set_distances
from diffexpo.assembly.runs import logged_to
from diffexpo.assembly.sets import import_command
from diffexpo.bounded.images import read_image
from diffexpo.config.entries import Entry
from diffexpo.config.rewards import RewardCard
from diffexpo.config.suites import Suite
from diffexpo.data.drawn_images import drawn_images, image_files
from diffexpo.data.prompts import filter_long
from diffexpo.data.prompts import read_prompts as load_prompts
from diffexpo.diffusion.sampling import num_network_evaluations
from diffexpo.diffusion.transitions import sampler_transitions
from diffexpo.errors import ConfigError, DataError, Interrupted, MissingError
from diffexpo.evaluation.benchmark import Json, Judge, Judged, Outcome, check_gates, failures, gates
from diffexpo.evaluation.benchmark_page import PAGE, SetNumbers, markdown, table_rows, verdict, write_page
from diffexpo.evaluation.gallery import Gallery, Rows
from diffexpo.evaluation.kept import keep_suite
from diffexpo.evaluation.suites import Embedder, choose_prompts, describe_scorer, draw_batch, noise_of
from diffexpo.online.loop import Console
from diffexpo.policies.family import FamilyPolicy
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.scoring import score_drawn
from diffexpo.training.distributed import World, start_world, stop_world
from diffexpo.training.lock import RunLock
from diffexpo.training.signals import StopSignal
from diffexpo.types import Drawn, Prompt, Scorer
from diffexpo.worlds import embedded_prompts

AGAIN = "what is drawn and scored is kept; the same command continues"


@dataclass(frozen=True)
class Evaluating:
    """One call: what is evaluated and where; how models are loaded; what is compared with what.

    `against` is the label of the model that the others are compared with (None: the first), `real` a folder
    of real images, `gates` are `--fail-below` texts, and `command` makes the page again.
    """

    suite: Suite
    entries: Sequence[Entry]
    out: Path
    device: str = "auto"
    dtype: str = "float32"
    shows_trained: bool = False
    against: str | None = None
    real: Path | None = None
    gates: Sequence[str] = ()
    command: str = ""


@dataclass(frozen=True)
class Evaluated:
    """The page, its numbers, and the gates that are not met, a sentence each."""

    page: Path
    numbers: Json
    failures: Sequence[str]


def evaluate_models(asked: Evaluating, console: Console) -> Evaluated:
    """Draw what is missing of every entry, score what is missing of every judge, and write the page.

    Raises:
        ConfigError: the folder holds another evaluation, or a judge that trained a model; see
            `config.entries` and `config.suites` for what is refused before.
        MissingError: prompts, a model, a judge or a folder of images is not there.
        Interrupted: a signal arrived; the same call continues.
    """
    plan = prepare(asked, console)
    with ExitStack() as stack:
        world = start_world(device=asked.device)
        stack.callback(stop_world, world)
        if world.rank == 0:
            stack.enter_context(RunLock(asked.out))
            stack.enter_context(logged_to(console))
        stop = stack.enter_context(StopSignal())
        try:
            outcome, embedder = _evaluate(asked, plan, console, world, stop.check)
        except Interrupted as error:
            raise Interrupted(f"{str(error).partition(';')[0]}; {AGAIN}") from None
        against = asked.against or asked.entries[0].label
        page = asked.out / PAGE
        numbers: Json = {}
        if world.rank == 0:
            sets = SetNumbers(
                diversities(outcome, embedder, "; ".join(judge.key for judge in outcome.judges)),
                None if asked.real is None else set_distances(outcome, asked.real, embedder),
            )
            page, numbers = write_page(outcome, asked.out, against, asked.command, sets)
            _tell(outcome, against, console)
        return Evaluated(page, numbers, failures(outcome, gates(asked.gates), against))


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is written: prompts in their published order, the images to draw, what
    each entry is to the bit, and which judges trained it."""

    prompts: Sequence[Prompt]
    rows: Rows
    identities: Mapping[str, str]
    trained: Mapping[str, Sequence[str]]


def prepare(asked: Evaluating, console: Console) -> Prepared:
    """Look for everything that is named, and refuse what means nothing, before anything is spent."""
    suite, labels = asked.suite, [entry.label for entry in asked.entries]
    if asked.against is not None and asked.against not in labels:
        raise ConfigError(
            f"--against {asked.against!r}: no model is called so; there are {', '.join(labels)}"
        )
    check_gates(gates(asked.gates), [judge.name for judge in suite.judges], len(labels))
    if asked.real is not None:
        image_files(asked.real)
    prompts = read_prompts(suite, console)
    chosen = choose_prompts(prompts, suite.num_prompts or len(prompts), suite.seed)
    rows = Rows(tuple(chosen), suite.images_per_prompt, suite.batch_size)
    for entry in asked.entries:
        if entry.kind == "images":
            _found(entry, rows, prompts)
    return Prepared(
        prompts,
        rows,
        {entry.label: identity(entry, asked.dtype) for entry in asked.entries},
        {entry.label: refuse_trained(entry, suite.judges, asked.shows_trained) for entry in asked.entries},
    )


def _evaluate(
    asked: Evaluating, plan: Prepared, console: Console, world: World, check: Callable[[], None]
) -> tuple[Outcome, Embedder]:
    suite, rows = asked.suite, plan.rows
    galleries = {entry.label: Gallery(asked.out / "models" / entry.folder, rows) for entry in asked.entries}
    order = {prompt.id: place for place, prompt in enumerate(plan.prompts)}
    if world.rank == 0:
        keep_suite(asked.out, suite, rows, order)
        for entry in asked.entries:
            _claim(entry, galleries[entry.label], plan.identities[entry.label])
    world.barrier()
    if any(gallery.missing() for gallery in galleries.values()):
        # A judge that is missing is named before the first image; it is loaded anew when its turn comes, so
        # that it does not take the models' memory.
        load_rewards(suite.judges, resolve, world.device)
        if world.rank == 0:
            for entry in asked.entries:
                if entry.lora is not None and galleries[entry.label].missing():
                    check_lora(entry, asked.dtype)
    for entry in asked.entries:
        _draw_entry(asked, entry, galleries[entry.label], plan.prompts, console, world, check)
    scorers = load_rewards(suite.judges, resolve, world.device)
    judges = [
        _score(card, scorer, galleries, console, world, check)
        for card, scorer in zip(suite.judges, scorers, strict=True)
    ]
    if world.rank == 0:
        for label, gallery in galleries.items():
            for judge in judges:
                gallery.keep_judge(judge.key, vars(judge) | {"trained": judge.name in plan.trained[label]})
    world.barrier()
    models = tuple(
        Judged(
            entry.label,
            entry.told(),
            galleries[entry.label],
            {judge.name: galleries[entry.label].scores(judge.key) for judge in judges},
            tuple(plan.trained[entry.label]),
        )
        for entry in asked.entries
    )
    return Outcome(suite, rows, models, tuple(judges), order), vendi_embedder(scorers)


def _claim(entry: Entry, gallery: Gallery, found: str) -> None:
    """Write what a gallery is of, or refuse one of another model."""
    gallery.claim(
        {
            "label": entry.label,
            "what": entry.told(),
            "kind": entry.kind,
            "identity": found,
            "guidance": entry.guidance,
        },
        f"name this one apart (LABEL={entry.path}), or delete the folder",
    )


def read_prompts(suite: Suite, console: Console) -> list[Prompt]:
    """The prompts of a suite in their published order, and a word where they are not the published number."""
    try:
        prompts = embedded_prompts(suite.prompts)
        if prompts is None:
            prompts, report = load_prompts(resolve(suite.prompts), f"suite {suite.name}, prompts")
            if report.duplicates:
                console.warning(f"{suite.prompts}: {report.duplicates} repeated prompts are left out")
    except MissingError as error:
        if suite.published is None:
            raise
        raise MissingError(f"{error}\n{import_command(suite)}") from None
    for category, expected in suite.categories.items():
        found = sum(prompt.category == category for prompt in prompts)
        if found != expected:
            console.warning(
                f"suite {suite.name}: {found} prompts of the category {category!r}, the published list has "
                f"{expected}; repeated prompts are left out when a list is imported"
            )
    if suite.num_prompts is not None and suite.num_prompts > len(prompts):
        raise ConfigError(
            f"num_prompts = {suite.num_prompts}: {suite.prompts} holds {len(prompts)} different prompts; "
            "expected that many at most"
        )
    return prompts


# Many parameters because each is a part of the call that the steps share.
def _draw_entry(
    asked: Evaluating,
    entry: Entry,
    gallery: Gallery,
    prompts: Sequence[Prompt],
    console: Console,
    world: World,
    check: Callable[[], None],
) -> None:
    missing = gallery.missing()
    damaged = [batch for batch in missing if gallery.is_damaged(batch)]
    if damaged:
        console.warning(
            f"{entry.label}: {len(damaged)} batches have changed or lost images; they are drawn again"
        )
    world.barrier()  # everybody has looked before anything is drawn
    if not missing:
        return
    mine = [batch for batch in missing if batch % world.size == world.rank]
    if entry.kind == "images":
        _copy(entry, gallery, prompts, mine, console)
    else:
        with opened(entry, asked.dtype, asked.device, gallery.folder, world) as (policy, version):
            _draw(asked.suite, entry, gallery, (policy, version), mine, console, check)
    world.barrier()


# Many parameters because each is a part of the call that the steps share.
def _draw(
    suite: Suite,
    entry: Entry,
    gallery: Gallery,
    drawer: tuple[FamilyPolicy, str],
    batches: Sequence[int],
    console: Console,
    check: Callable[[], None],
) -> None:
    """Draw batches, each written as soon as it is there."""
    policy, version = drawer
    rows, sampler = gallery.rows, suite.sampler_of(policy.path.kind)
    guidance = policy.card.default_guidance if entry.guidance is None else entry.guidance
    sampler = sampler if guidance is None else sampler.model_copy(update={"guidance": guidance})
    sampler_transitions(policy.path, sampler)  # refuses a sampler that does not fit the model
    _, cut = filter_long(rows.prompts, policy.count_tokens, policy.max_tokens)
    if cut:
        console.warning(
            f"{entry.label}: {len(cut)} of {len(rows.prompts)} prompts exceed {policy.max_tokens} tokens; "
            "the model reads the beginning only"
        )
    is_guided = sampler.guidance != 1.0
    empty = policy.encode_prompts([""]) if is_guided else None
    with console.phase(f"draw {entry.label}", len(batches) * sampler.steps, "steps") as bar:

        def tick() -> None:
            bar.advance(1)
            check()

        for batch in batches:
            began = time.monotonic()
            texts = [rows.prompt(row).text for row in rows.of(batch)]
            keys = [(rows.prompt(row).id, rows.index(row)) for row in rows.of(batch)]
            negative = None if empty is None else empty.select([0] * len(texts))
            with torch.no_grad():
                inputs = policy.encode_prompts(texts), negative, noise_of(suite.seed, keys, policy)
            _, images, seen = draw_batch(policy, version, inputs, sampler, tick)
            finite = torch.isfinite(seen).flatten(1).all(dim=1).tolist()
            gallery.keep(
                batch,
                [image if is_whole else None for image, is_whole in zip(images, finite, strict=True)],
                seconds=round(time.monotonic() - began, 3),
                evaluations=len(texts) * num_network_evaluations(sampler, is_guided),
                sampler=sampler.model_dump(mode="json"),
                cut_prompts=len(cut),
            )
            check()


def _copy(
    entry: Entry, gallery: Gallery, prompts: Sequence[Prompt], batches: Sequence[int], console: Console
) -> None:
    """Take over the images of a folder, by the texts of their prompts."""
    rows = gallery.rows
    found, known = _found(entry, rows, prompts), {prompt.text for prompt in rows.prompts}
    absent = sum(text not in found for text in known)
    beyond = sum(
        max(len(paths) - rows.images_per_prompt, 0) for text, paths in found.items() if text in known
    )
    foreign = sum(text not in known for text in found)
    for count, what in (
        (absent, "prompts of the suite have no image there and count for nothing"),
        (beyond, f"images are beyond the {rows.images_per_prompt} of their prompt and left out"),
        (foreign, "prompts there are not of the suite and left out"),
    ):
        if count:
            console.warning(f"{entry.label}: {count} {what}")
    for batch in batches:
        images: list[np.ndarray | None] = []
        for row in rows.of(batch):
            paths = found.get(rows.prompt(row).text, [])
            images.append(read_image(paths[rows.index(row)]) if rows.index(row) < len(paths) else None)
        gallery.keep(batch, images)


def _found(entry: Entry, rows: Rows, prompts: Sequence[Prompt]) -> dict[str, list[Path]]:
    """The images of a folder by prompt; a DataError where none is of the suite."""
    found = drawn_images(Path(entry.path).expanduser(), prompts)
    if not any(prompt.text in found for prompt in rows.prompts):
        raise DataError(
            f"{entry.label}: none of the {len(found)} prompts of {entry.path} is one of the suite's "
            f"{len(rows.prompts)}; the first there is {next(iter(found))!r:.60}, here "
            f"{rows.prompts[0].text!r:.60}"
        )
    return found


# Many parameters because each is a part of the call that the steps share.
def _score(
    card: RewardCard,
    scorer: Scorer,
    galleries: Mapping[str, Gallery],
    console: Console,
    world: World,
    check: Callable[[], None],
) -> Judge:
    """Score what no judge of that version has seen."""
    version = hashlib.sha256(f"{card.type} {describe_scorer(scorer)}".encode()).hexdigest()[:12]
    judge = Judge.of(card, scorer.version, scorer.scale, f"{card.name}-{version}")
    for label, gallery in galleries.items():
        batches = gallery.rows.batches
        missing = [batch for batch in batches if gallery.scores_of(judge.key, batch) is None]
        world.barrier()  # everybody has looked before anything is scored
        mine = [batch for batch in missing if batch % world.size == world.rank]
        if mine:
            with console.phase(f"{card.name} judges {label}", len(mine), "batches") as bar:
                for batch in mine:
                    gallery.keep_scores(judge.key, batch, scores_of(scorer, gallery, batch))
                    bar.advance(1)
                    check()
    return judge


def scores_of(scorer: Scorer, gallery: Gallery, batch: int) -> list[float]:
    """Scores of a batch's images, NaN for those that there are not or that the scorer fails on; images of
    one size, side by side, are scored together."""
    rows = gallery.rows
    found = [gallery.read(row) for row in rows.of(batch)]
    texts = [rows.prompt(row).text for row in rows.of(batch)]
    scores = np.full(len(found), np.nan)
    there = [(place, image) for place, image in enumerate(found) if image is not None]
    for _, same in groupby(there, key=lambda one: one[1].shape):
        places, images = zip(*same, strict=True)
        pixels = np.stack(images).transpose(0, 3, 1, 2)
        seen = torch.from_numpy(pixels.astype(np.float32) / 255.0)
        drawn = Drawn(None, seen)
        scores[list(places)] = score_drawn([scorer], drawn, [texts[place] for place in places])[scorer.name]
    return [float(score) for score in scores]


def _tell(outcome: Outcome, against: str, console: Console) -> None:
    """The verdict and the table, in lines."""
    _, title, sentences = verdict(outcome, against)
    header, rows = table_rows(outcome, against)
    for line in (f"{title}.", *sentences, "", *markdown(header, rows).splitlines()):
        console.line(line)
    for model in outcome.models:
        for judge, count in outcome.excluded(model).items():
            console.warning(f"{model.label}: {count} images have no score of {judge} and are left out")
