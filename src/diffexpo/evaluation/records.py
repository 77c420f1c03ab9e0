"""The files that an evaluation leaves in a run folder and the report reads. Imports without torch.

    <run>/config.yaml         resolved configuration
    <run>/env.json            versions and machine, any JSON object
    <run>/status.json         {"state": "running" | "finished" | "interrupted" | "failed", ...}
    <run>/metrics.jsonl       one JSON object per line: iteration, step, phase, wall_s and "name": number
    <run>/eval/<version>/     base, iteration-1, iteration-2, ..., baseline: suite.json + images/00000.png ...
    <run>/eval/pairs/         pairs.json + images of the example pairs
    <run>/baseline/           run folder of the offline baseline; its metrics.jsonl is read for its cost
    <run>/contenders/         the base at other guidance (base-2.5, ...) and contenders by name:
                              NAME/config.yaml, NAME/metrics.jsonl, and eval/NAME/ as <run>/eval/<version>
    <run>/store/manifests/    validate-0001.json, ...: scores of iterates under `explore.keep: best`

Phases in metrics.jsonl: `train` is one line per optimiser step; `train_summary`, `collect`, `pair` and
`evaluate` are one line per iteration. `cost/*` and `time/*` are amounts spent in what the line describes, so
their sum is the run's total.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from diffexpo.bounded.images import read_image
from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.bounded.yaml_texts import read_settings
from diffexpo.data.identity import accepted_changes
from diffexpo.data.manifests import read_manifests
from diffexpo.data.rows import MarginOfPair, Pair
from diffexpo.errors import DataError, MissingError, StoreError
from diffexpo.files import checksum_of, sha256_of, sync_tree, write_json
from diffexpo.online.keeping import STAGE as VALIDATE
from diffexpo.training.metrics import sound_metrics
from diffexpo.types import Prompt

Json = dict[str, Any]
_log = logging.getLogger("diffexpo")
CONTENDERS = "contenders"
PAIR_RULES = ("first", "median margin", "largest margin")


@dataclass
class SuiteResult:
    """One version's images and numbers on the evaluation prompts.

    Rows are images: `prompt_index` and `image_index` (N,), `images` (N,H,W,3) uint8, `scores` scorer -> (N,)
    with NaN where scoring failed. Rows whose image_index is below `images_per_prompt` enter rewards and win
    rates; the others exist for the Vendi score. `roles` says for each scorer whether it is a `heldout` judge
    (never trained on), a `train` reward or a reward that the run only looks at (`watch`).
    `vendi` maps a prompt id to its Vendi score over `vendi_images` images; `kl` holds one path KL (nats per
    image) a row.
    """

    version: str
    prompts: tuple[Prompt, ...]
    prompt_index: np.ndarray
    image_index: np.ndarray
    images: np.ndarray
    scores: dict[str, np.ndarray]
    roles: dict[str, str]
    scorers: dict[str, str] = field(default_factory=dict)
    images_per_prompt: int = 1
    vendi: dict[str, float] = field(default_factory=dict)
    vendi_images: int = 0
    embedder: str = ""
    kl: list[float] = field(default_factory=list)
    kl_estimator: str = ""
    sampler: Json = field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0
    network_evaluations: int = 0

    @property
    def scored(self) -> np.ndarray:
        """Mask (N,) of the rows that rewards and win rates use."""
        return self.image_index < self.images_per_prompt

    def prompt_ids(self) -> list[str]:
        """Prompt id of each row."""
        return [self.prompts[index].id for index in self.prompt_index]

    def by_image(self, scorer: str) -> dict[tuple[str, int], float]:
        """Score of every scored image by (prompt id, image index), which name its noise; empty for a scorer
        that is not there."""
        if scorer not in self.scores:
            return {}
        ids = self.prompt_ids()
        rows = np.flatnonzero(self.scored)
        return {(ids[row], int(self.image_index[row])): float(self.scores[scorer][row]) for row in rows}

    def row_of(self, prompt: str, index: int = 0) -> int | None:
        """Row of an image of the prompt of this id; None: it was not drawn."""
        rows = zip(self.prompt_ids(), self.image_index, strict=True)
        return next((row for row, found in enumerate(rows) if found == (prompt, index)), None)


@dataclass(frozen=True)
class PairExample:
    """A collected pair, chosen by `rule`, as the report shows it; images are files next to pairs.json."""

    pair_id: str
    iteration: int
    prompt: str
    rule: str
    margin: float | None
    winner_agent: str
    loser_agent: str
    winner_negative: str = ""
    loser_negative: str = ""
    winner_scores: Mapping[str, float | None] = field(default_factory=dict)
    loser_scores: Mapping[str, float | None] = field(default_factory=dict)
    winner_image: str = ""
    loser_image: str = ""


@dataclass(frozen=True)
class ContenderRecord:
    """A contender's evaluation, settings and metrics; settings and metrics are empty for the base at another
    guidance."""

    suite: SuiteResult
    config: Json
    metrics: list[Json]


@dataclass
class RunRecord:
    """Everything a report can be made of; what is absent is empty. `validations` has the manifest of each
    validated iterate."""

    run_dir: Path
    config: Json
    env: Json
    status: Json
    metrics: list[Json]
    suites: dict[str, SuiteResult]
    baseline_metrics: list[Json]
    examples: list[PairExample]
    problems: list[str]
    contenders: dict[str, ContenderRecord] = field(default_factory=dict)
    validations: dict[int, Json] = field(default_factory=dict)

    @property
    def iterations(self) -> list[int]:
        """Evaluated iterations in order."""
        return sorted(int(name.split("-")[1]) for name in self.suites if name.startswith("iteration-"))


def save_suite(result: SuiteResult, folder: Path) -> Path:
    """Write images as PNG, then suite.json (its existence means complete), to `<run>/eval/<version>`, the
    folder; `load_suite` gives back an equal result, images bit for bit."""
    save_images(folder, range(len(result.images)), result.images)
    arrays = ("images", "scores", "prompts", "prompt_index", "image_index")
    payload = {name: value for name, value in vars(result).items() if name not in arrays} | {
        "prompts": [vars(prompt) | {"attributes": dict(prompt.attributes)} for prompt in result.prompts],
        "prompt_index": result.prompt_index.tolist(),
        "image_index": result.image_index.tolist(),
        "scores": {name: [_number(value) for value in values] for name, values in result.scores.items()},
        "kl": [_number(value) for value in result.kl],
        "pictures": [sha256_of(image_path(folder, row)) for row in range(len(result.images))],
    }
    sync_tree(folder)
    payload = parse_json(json.dumps(payload, allow_nan=False))
    write_json(folder / "suite.json", payload | {"sha256": checksum_of(payload)})
    return folder


def save_images(folder: Path, rows: Iterable[int], images: np.ndarray) -> None:
    """Write images (N,H,W,3) uint8 of a suite under the numbers of their rows."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, images, strict=True):
        Image.fromarray(image).save(image_path(folder, row))


def is_saved(folder: Path) -> bool:
    """Whether a complete suite lies in the folder."""
    return (folder / "suite.json").exists()


def load_suite(folder: Path, *, with_images: bool = True) -> SuiteResult:
    """Read what `save_suite` wrote: MissingError without suite.json (the evaluation never finished), and
    DataError if a file is damaged or an image is missing. Without images their place is held by (N,1,1,3)
    zeros that take no memory."""
    path = folder / "suite.json"
    if not path.exists():
        reason = f"the evaluation of {folder.name!r} did not finish; run `diffexpo run --resume`"
        raise MissingError(f"{path} does not exist: {reason}")
    try:
        fields = read_json(path)
        if "sha256" in fields and fields.pop("sha256") != checksum_of(fields):
            raise ValueError("the checksum of suite.json does not match")
        pictures = fields.pop("pictures", [])
        fields["prompts"] = tuple(Prompt(**prompt) for prompt in fields["prompts"])
        for name in ("prompt_index", "image_index"):
            fields[name] = np.array(fields[name], dtype=np.int64)
        fields["scores"] = {name: np.array(_floats(values)) for name, values in fields["scores"].items()}
        fields["kl"] = _floats(fields["kl"])
        rows = range(len(fields["prompt_index"]))
        fields["images"] = np.broadcast_to(np.uint8(0), (len(rows), 1, 1, 3))
        if with_images:
            for row, digest in enumerate(pictures):
                if sha256_of(image_path(folder, row)) != digest:
                    raise ValueError(f"{image_path(folder, row).name} is not the image that was scored")
            fields["images"] = np.stack([read_image(image_path(folder, row)) for row in rows])
        return SuiteResult(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        advice = "delete the folder and run `diffexpo run --resume`"
        raise DataError(f"{folder}: not a complete evaluation ({error}); {advice}") from error


AnyPair = TypeVar("AnyPair", Pair, MarginOfPair)


def choose_pair_examples(pairs: Sequence[AnyPair]) -> list[tuple[str, AnyPair]]:
    """Up to three (rule, pair) of one iteration's pairs in store order, without repeats: chosen by rule."""
    if not pairs:
        return []
    # Pairs of people and of folders have no margin.
    margins = {pair.pair_id: -math.inf if pair.margin is None else pair.margin for pair in pairs}
    ordered = sorted(pairs, key=lambda pair: (margins[pair.pair_id], pair.pair_id))
    chosen: dict[str, tuple[str, AnyPair]] = {}
    for rule, pair in zip(PAIR_RULES, (pairs[0], ordered[len(ordered) // 2], ordered[-1]), strict=True):
        chosen.setdefault(pair.pair_id, (rule, pair))
    return list(chosen.values())


def save_pair_examples(
    run_dir: Path, iteration: int, examples: Sequence[tuple[PairExample, np.ndarray, np.ndarray]]
) -> None:
    """Write an iteration's example pairs (example, winner (H,W,3) uint8, loser) to `<run>/eval/pairs`."""
    folder = run_dir / "eval" / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        known = _read_examples(folder)
    except DataError as error:
        _log.warning("%s; the examples of other iterations are lost", error)
        known = []
    rows = [asdict(example) for example in known if example.iteration != iteration]
    for index, (example, winner, loser) in enumerate(examples):
        row = asdict(example)
        for side, image in (("winner", winner), ("loser", loser)):
            row[f"{side}_image"] = f"{iteration:04d}-{index}-{side}.png"
            Image.fromarray(image).save(folder / row[f"{side}_image"])
            scores = row[f"{side}_scores"]
            row[f"{side}_scores"] = {name: _number(value) for name, value in scores.items()}
        rows.append(row)
    rows.sort(key=lambda row: row["iteration"])
    write_json(folder / "pairs.json", {"pairs": rows, "checksum": checksum_of({"pairs": rows})})


def _read_examples(folder: Path) -> list[PairExample]:
    """The example pairs of a folder; DataError where pairs.json is not what was written."""
    found = _read_json(folder / "pairs.json", [])
    rows, known = (found.get("pairs"), found.get("checksum")) if isinstance(found, dict) else (found, None)
    try:
        if isinstance(found, dict) and checksum_of({"pairs": rows}) != known:
            raise ValueError("its checksum does not match")
        return [PairExample(**row) for row in rows or ()]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder / 'pairs.json'} is damaged ({error}); restore it, or delete it: the report then has no "
            "example pairs"
        ) from error


def series(lines: Iterable[Json], name: str, phase: str | None = None) -> list[tuple[int, float]]:
    """(iteration, value) of every finite value of one metric, in file order."""
    found = []
    for line in lines:
        value = line.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and phase in (None, line.get("phase")):
            found.append((iteration_of(line), float(value)))
    return found


def iteration_of(line: Json) -> int:
    """The iteration that a line of metrics.jsonl belongs to; 0 for none."""
    return int(line.get("iteration") or 0)


def load_run(run_dir: Path, *, with_images: bool = True) -> RunRecord:
    """Read a run folder, finished or not; what cannot be read becomes a sentence in `problems`. MissingError
    if the folder holds no config.yaml, so that it is not a run. Numbers need no images: see `load_suite`."""
    config_path = run_dir / "config.yaml"
    if not config_path.exists():
        advice = "give the folder of `diffexpo run`"
        raise MissingError(f"{run_dir} is not a run folder: {config_path} does not exist; {advice}")
    problems = accepted_changes(run_dir)

    def metrics_of(path: Path) -> list[Json]:
        rows, damaged = sound_metrics(path)
        problems.extend(damaged)
        return rows

    beside = run_dir / CONTENDERS
    suites = _load_suites(run_dir / "eval", problems, with_images)
    contenders = {
        name: ContenderRecord(
            suite, _read_config(beside / name / "config.yaml"), metrics_of(beside / name / "metrics.jsonl")
        )
        for name, suite in _load_suites(beside / "eval", problems, with_images).items()
    }
    examples: list[PairExample] = []
    try:
        examples = _read_examples(run_dir / "eval" / "pairs")
    except DataError as error:
        problems.append(str(error))
    validations: dict[int, Json] = {}
    try:
        validations = read_manifests(run_dir / "store", VALIDATE)
    except StoreError as error:
        problems.append(str(error))
    return RunRecord(
        run_dir=run_dir,
        config=_read_config(config_path),
        env=_read_json(run_dir / "env.json", {}),
        status=_read_json(run_dir / "status.json", {}),
        metrics=metrics_of(run_dir / "metrics.jsonl"),
        suites=suites,
        baseline_metrics=metrics_of(run_dir / "baseline" / "metrics.jsonl"),
        examples=examples,
        problems=problems,
        contenders=contenders,
        validations=validations,
    )


def _load_suites(root: Path, problems: list[str], with_images: bool) -> dict[str, SuiteResult]:
    """The evaluations in a folder by version; what cannot be read becomes a sentence in `problems`."""
    suites: dict[str, SuiteResult] = {}
    for folder in sorted(root.glob("*/"), key=_version_order):
        if folder.name == "pairs":
            continue
        try:
            suites[folder.name] = load_suite(folder, with_images=with_images)
        except (MissingError, DataError) as error:
            problems.append(str(error))
    return suites


def _version_order(folder: Path) -> tuple[int, int, str]:
    if folder.name == "base":
        return (0, 0, "")
    kind, _, number = folder.name.partition("-")
    return (1, int(number), "") if kind == "iteration" and number.isdigit() else (2, 0, folder.name)


def image_path(folder: Path, row: int) -> Path:
    """Where a suite keeps the image of a row."""
    return folder / "images" / f"{row:05d}.png"


def _read_json(path: Path, absent: Any) -> Any:
    if not path.exists():
        return absent
    try:
        return read_json(path)
    except (ValueError, RecursionError) as error:
        advice = "the file is damaged: restore it, or delete it"
        raise DataError(f"{path}: not JSON ({error}); {advice}") from error


def _read_config(path: Path) -> Json:
    return read_settings(path) if path.exists() else {}


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
