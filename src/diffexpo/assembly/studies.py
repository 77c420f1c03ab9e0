"""Studies: a protocol and the images of several models become a book; its votes become a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from diffexpo.assembly.rating import find_book
from diffexpo.bounded.images import read_image
from diffexpo.bounded.yaml_texts import read_yaml_text
from diffexpo.config.people import StudyConfig
from diffexpo.config.studies import protocol_to_yaml, read_study
from diffexpo.data.images import encode_png
from diffexpo.errors import ConfigError, DataError, MissingError
from diffexpo.evaluation.people import couples_of, detectable_rate
from diffexpo.evaluation.records import load_suite
from diffexpo.evaluation.study_report import StudyVotes, describe_study
from diffexpo.files import sha256_of, write_text
from diffexpo.labelling.asking import missing_votes
from diffexpo.labelling.book import FILE, VOTE, Book
from diffexpo.labelling.counting import left_out, rater_reports
from diffexpo.labelling.export import COLUMNS, anonymous_rows, export_votes
from diffexpo.labelling.making import Couple, add_couples, open_book
from diffexpo.rng import keyed_order

PROTOCOL = "protocol.yaml"
PROMPTS = "prompts.txt"
Images = dict[str, Callable[[], bytes]]
"""Prompt -> what reads its image as PNG bytes."""


def new_study(folder: Path, protocol: Path | None, given: Mapping[str, object]) -> list[str]:
    """Write a study: its protocol, its images under names that tell nothing, its questions.

    Args:
        folder: Where it is made; it must not hold one.
        protocol: YAML with settings of `StudyConfig`; `given` come before them.
    Returns:
        What it will cost and what it can see, a line each.
    Raises:
        ConfigError: the protocol is wrong, or there is a study in the folder. MissingError: a model has no
            images. DataError: the models share no prompt.
    """
    if (folder / FILE).is_file() or (folder / PROTOCOL).is_file():
        raise ConfigError(f"{folder} holds a study, whose protocol is fixed; choose another folder")
    text, origin = "", "the command line"
    if protocol is not None:
        if not protocol.is_file():
            raise MissingError(
                f"{protocol} does not exist; expected a YAML file with the protocol of a study"
            )
        text, origin = read_yaml_text(protocol), str(protocol)
    study = read_study(text, origin, given)
    images = {model: images_of(model, source) for model, source in study.models.items()}
    prompts = _shared_prompts(study, images)
    couples = [
        Couple(
            f"prompt-{number:05d}", prompt, first, second, images[first][prompt](), images[second][prompt]()
        )
        for number, prompt in enumerate(prompts)
        for first, second in couples_of(list(study.models), study.against)
    ]
    write_text(folder / PROTOCOL, protocol_to_yaml(study))
    sources = {model: _digest(images[model], prompts) for model in study.models}
    facts = {"protocol": sha256_of(folder / PROTOCOL), "sources": sources, "prompts": prompts}
    with open_book(folder, study.name, study.rating, facts) as book:
        add_couples(book, 0, couples, study.questions, study.votes)
    answers = len(couples) * len(study.questions) * study.votes
    per_couple = detectable_rate(len(prompts), study.votes)
    each = -(-answers // study.raters)
    asked = f"{len(study.questions)} questions, {study.votes} votes each"
    return [
        f"{len(prompts)} prompts, {len(couples)} pairs, {asked}",
        f"{answers} answers in all, {each} for each of {study.raters} raters, and checks",
        f"a comparison tells a win rate of {per_couple:.1%} or more from one half (5% level, 80% power)",
    ]


def _digest(images: Images, prompts: Sequence[str]) -> str:
    """SHA-256 over a model's images of the prompts that are shown."""
    digest = sha256()
    for prompt in prompts:
        digest.update(sha256(images[prompt]()).digest())
    return digest.hexdigest()


def changed_models(study: StudyConfig, book: Book) -> list[str]:
    """Models whose images are no longer those that the study copied, a sentence each; their votes stand."""
    known, prompts, found = book.fact("sources") or {}, book.fact("prompts") or [], []
    for model, digest in known.items():
        try:
            is_same = _digest(images_of(model, study.models[model]), prompts) == digest
            what = "" if is_same else "are no longer those that were shown"
        except (KeyError, MissingError, DataError):
            what = "are gone"
        if what:
            found.append(
                f"the images of {model} in {study.models[model]} {what}: the votes are on the copies "
                "that the study made when it began"
            )
    return found


def images_of(model: str, source: str) -> Images:
    """The images of a model by prompt: of an evaluation in a run's folder, or of a folder of images.

    Raises:
        MissingError: there is no such folder. DataError: it has no images, or a prompt twice.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _folder_images(model, folder)
    name, _, version = source.rpartition(":")
    for run in (Path(name).expanduser(), Path("runs") / name):
        if name and (run / "config.yaml").is_file():
            return _suite_images(model, run / "eval" / version)
    raise MissingError(
        f"models.{model} = {source!r}: neither a folder of images nor RUN:VERSION of a run, such as "
        "runs/expo:base; expected one of them"
    )


def _suite_images(model: str, folder: Path) -> Images:
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in folder.parent.glob("*") if path.is_dir())) or "none"
        raise MissingError(f"models.{model}: {folder} does not exist; evaluations there: {have}")
    suite = load_suite(folder)
    found: Images = {}
    for number, prompt in enumerate(suite.prompts):
        row = suite.row_of(prompt.id)
        if row is not None and suite.prompt_index[row] == number:
            found[prompt.text] = lambda row=row: encode_png(suite.images[row])  # type: ignore[misc]
    return found


def _folder_images(model: str, folder: Path) -> Images:
    listed = folder / PROMPTS
    if not listed.is_file():
        raise MissingError(
            f"models.{model}: {listed} does not exist; expected a prompt a line, and an image for each: "
            "00000.png ..."
        )
    prompts = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    found: Images = {}
    for number, prompt in enumerate(prompts):
        path = folder / f"{number:05d}.png"
        if not path.is_file():
            raise MissingError(f"models.{model}: {path} does not exist; it is the image of {prompt!r:.60}")
        if prompt in found:
            raise DataError(f"models.{model}: {listed} holds {prompt!r:.60} twice; expected each prompt once")
        found[prompt] = lambda path=path: _read_png(path)  # type: ignore[misc]
    return found


def _read_png(path: Path) -> bytes:
    """An image written anew, so that nothing in its file tells the model."""
    return encode_png(read_image(path))


def _shared_prompts(study: StudyConfig, images: Mapping[str, Images]) -> list[str]:
    """The prompts that are shown: of those that all models have, as many as asked for, by keyed order."""
    shared = set.intersection(*(set(found) for found in images.values()))
    if not shared:
        sizes = ", ".join(f"{model}: {len(found)}" for model, found in images.items())
        raise DataError(f"the models share no prompt ({sizes} prompts); expected images of the same prompts")
    if study.prompts is not None and study.prompts > len(shared):
        raise ConfigError(
            f"prompts = {study.prompts}: the models share {len(shared)}; expected that many at most"
        )
    return keyed_order(shared, study.seed, "study prompts")[: study.prompts or len(shared)]


def report_study(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write `report.md`, `report.json` and `votes.parquet` of a study into its folder; returns the report.

    Args:
        say: Called with what the owner should know, such as models whose images have changed since.
    Raises:
        ConfigError: the protocol is not the one that the study began with. StoreError: an image has changed.
    """
    folder = find_book(folder)
    path = folder / PROTOCOL
    if not path.is_file():
        raise MissingError(
            f"{path} does not exist: {folder} holds what a run asks, not a study; its pairs are in the "
            "run's report"
        )
    with Book(folder) as book:
        digest = str(book.fact("protocol"))
        if sha256_of(path) != digest:
            raise ConfigError(
                f"{path} is not the protocol that the study began with (SHA-256 {digest}): what is fixed "
                "beforehand cannot change afterwards; restore it"
            )
        book.verify_images()
        study = read_study(read_yaml_text(path), str(path))
        rows = anonymous_rows(book)
        if not any(
            row["kind"] == VOTE and row["answer"] != "skip" and not row["is_left_out"] for row in rows
        ):
            raise DataError(
                f"{folder} has no votes that count; serve it first: diffexpo study serve {folder}"
            )
        for line in changed_models(study, book):
            say(f"warning: {line}")
        reports = rater_reports(book)
        votes = StudyVotes(
            rows=rows,
            missing=missing_votes(book, without=left_out(book)),
            left_out=[
                f"a rater of {one.answers} votes: {'; '.join(one.reasons)}"
                for one in reports
                if one.is_left_out
            ],
            repeats_same=sum(one.repeats_same for one in reports),
            digest=digest,
            columns=COLUMNS,
        )
        text, numbers = describe_study(study, votes)
        export_votes(book, folder / "votes.parquet")
    write_text(folder / "report.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", text)
    return folder / "report.md"
