"""`rewards verify`: is a scorer what it should be, on this machine, with these weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffexpo.assembly.aliases import resolve
from diffexpo.bounded.texts import read_json
from diffexpo.config import load_config
from diffexpo.config.rewards import REWARDS, RewardCard
from diffexpo.config.worlds import world_of
from diffexpo.errors import ConfigError, DataError, MissingError, RewardError
from diffexpo.policies.loading import choose_device
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Reward
from diffexpo.worlds.emoji import base_row, load_images, load_rows

# Known scores of the shipped images, as `rewards verify ... --write` wrote them; cards name their file.
REFERENCES = Path(__file__).resolve().parents[1] / "assets" / "rewards"
CONCEPTS = (
    "1f525", "1f431", "1f34e", "1f697", "2b50", "1f3e0", "1f339", "1f41f",
    "1f600", "1f3b8", "1f4d6", "26bd", "1f33b", "1f355", "1f680", "1f332",
)  # fmt: skip
"""Images that are scored: plain things that every scorer should tell apart."""
SHARE_RIGHT = 0.75
"""Of 16 images 12 or more score higher with their own prompt by luck in 4 cases of 100."""
BATCH_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Picture:
    """One image with its prompt; `sha256` is that of its 8-bit RGB pixels.

    The emoji judges were trained on captions with a style in front and get `styled_prompt`, all other scorers
    get `prompt`.
    """

    name: str
    prompt: str
    styled_prompt: str
    sha256: str


@dataclass(frozen=True)
class Finding:
    """One line of the outcome: ok, fail, or note (for which there is no right or wrong)."""

    state: str
    what: str


@dataclass
class VerifyReport:
    """What was found, image by image: `scores` under its own prompt, `other_scores` under the next one's."""

    name: str
    type: str
    scale: str
    version: str
    pictures: list[str]
    prompts: list[str]
    scores: list[float]
    other_scores: list[float]
    checks: list[Finding] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Scorer, unit and fingerprint, in one line."""
        return f"{self.name} ({self.type}): {self.scale}; version {self.version[:16]}"

    def rows(self) -> list[tuple[str, str, float, float]]:
        """(image, prompt, score, score of another image's prompt)."""
        columns = zip(self.pictures, self.prompts, self.scores, self.other_scores, strict=True)
        return [(picture, prompt, round(own, 4), round(other, 4)) for picture, prompt, own, other in columns]


def verify_rewards(
    what: str,
    *,
    device: str,
    against: Path | None,
    tolerance: float,
    pictures: Path | None,
    **settings: str | None,
) -> list[VerifyReport]:
    """Score the shipped images with a type of reward, or all scorers of a recipe, and check the outcome.

    Args:
        what: A type of `REWARDS`, or a recipe.
        device: "auto" or a torch device.
        against: File of known scores (`write_scores`); None: the shipped ones, where there are any.
        tolerance: Largest relative difference from known scores.
        pictures: Folder to write images and prompts to.
        settings: `path`, `base`, `scale` and `precision` of the reward, for a type.
    Returns:
        One report a scorer; a ConfigError refuses what is no type or recipe and settings that do not fit it.
    """
    configs = _configs(what, settings)
    for config in configs:
        if config.why_unverified:
            raise ConfigError(f"reward {config.name!r}: type {config.type} {config.why_unverified}")
    shown, images = verify_pictures()
    if pictures is not None:
        _write_pictures(pictures, shown, images)
    scorers = load_rewards(configs, resolve, _device(device))
    reports = []
    for config, scorer in zip(configs, scorers, strict=True):
        known = config.known_scores
        reference = against or (REFERENCES / known if known else None)
        reports.append(check_scorer(config, scorer, shown, images, reference, tolerance))
    return reports


def check_scorer(
    config: RewardCard,
    scorer: Reward,
    shown: Sequence[Picture],
    images: Tensor,
    reference: Path | None,
    tolerance: float,
) -> VerifyReport:
    """Score images under their own and under the next one's prompt, and check what can be checked."""
    is_judge = world_of(config.path or "") == "emoji"
    prompts = [picture.styled_prompt if is_judge else picture.prompt for picture in shown]
    own = score_drawn([scorer], Drawn(images=images), prompts)[scorer.name]
    other = score_drawn([scorer], Drawn(images=images), [*prompts[1:], prompts[0]])[scorer.name]
    names, scores = [picture.name for picture in shown], (own.tolist(), other.tolist())
    report = VerifyReport(config.name, config.type, scorer.scale, scorer.version, names, prompts, *scores)
    single = [(Drawn(images=images[i : i + 1]), prompts[i : i + 1]) for i in range(3)]
    alone = [score_drawn([scorer], *row)[scorer.name][0] for row in single]
    report.checks += _findings(config, own, other, np.array(alone))
    report.checks.append(_compared(report, reference, max(tolerance, config.score_slack)))
    return report


def verify_pictures() -> tuple[list[Picture], Tensor]:
    """The images that are scored, (16,3,64,64) in [0,1], and their prompts."""
    rows = load_rows()
    chosen = [
        base_row([row for row in rows if row["hexcode"].lower() == code and row["style"] == "noto"])
        for code in CONCEPTS
    ]
    images = torch.from_numpy(load_images([row["id"] for row in chosen]))
    shown = []
    for row, pixels in zip(chosen, to_bytes(images), strict=True):
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        shown.append(Picture(row["id"], f"{row['caption']} emoji", f"noto {row['caption']}", digest))
    return shown, images


def write_scores(reports: Sequence[VerifyReport], file: Path) -> None:
    """Scores as JSON for `--against`: {"scorers": [{name, type, scale, version, scores: {image: score}}]}."""
    scorers: list[dict[str, object]] = []
    for report in reports:
        facts = {name: getattr(report, name) for name in ("name", "type", "scale", "version")}
        scores = zip(report.pictures, report.scores, strict=True)
        scorers.append({**facts, "scores": {name: float(f"{score:.7g}") for name, score in scores}})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"scorers": scorers}, indent=1) + "\n", encoding="utf-8")


def require_passed(reports: Sequence[VerifyReport]) -> None:
    """Refuse scorers of which a check failed, with a RewardError that names them."""
    failed = {report.name for report in reports for check in report.checks if check.state == "fail"}
    if failed:
        advice = "do not train on this reward before it is understood"
        raise RewardError(f"{', '.join(sorted(failed))}: a check failed (above); {advice}")


def _configs(what: str, settings: Mapping[str, str | None]) -> list[RewardCard]:
    if what not in REWARDS:
        if any(value and value != "float32" for value in settings.values()):
            raise ConfigError(
                f"{what!r} is no type of reward ({', '.join(REWARDS)}), and a recipe brings its own "
                "settings: leave out --path, --base, --scale and --precision, or name a type"
            )
        near = difflib.get_close_matches(what, REWARDS, 1, cutoff=0.8)
        if near and not Path(what).exists():
            raise ConfigError(f"{what!r} is no type of reward and no recipe; did you mean {near[0]}?")
        config = load_config([what], [], {}).config
        return [*chain(*config.scorers.values())]
    given = {key: value for key, value in settings.items() if value is not None}
    only = {"name": what, "type": what, "role": "train"} | given
    return list(load_config([], [f"rewards={json.dumps([only])}"], {}).config.rewards)


def _device(device: str) -> torch.device:
    try:
        return choose_device("auto") if device == "auto" else torch.device(device)
    except RuntimeError as error:
        expected = f"expected auto, cpu, cuda, cuda:1, mps, ... ({error})"
        raise ConfigError(f"--device {device!r}: {expected}") from None


def _findings(config: RewardCard, own: np.ndarray, other: np.ndarray, alone: np.ndarray) -> Iterator[Finding]:
    """What every good scorer passes; `alone` are the first scores, each image in a batch of its own."""
    if count := int((~np.isfinite([own, other])).sum()):
        yield Finding("fail", f"{count} of {2 * len(own)} scores are not finite")
    elif np.ptp(own) == 0:
        yield Finding("fail", f"every picture has the score {own[0]:.6g}: it ranks nothing")
    else:
        yield Finding("ok", f"{2 * len(own)} scores are finite and not all the same")
    tolerance = BATCH_TOLERANCE if config.precision == "float32" else 5e-2
    yield _within("alone as in a batch", alone, own[: len(alone)], tolerance)
    if np.array_equal(own, other):
        yield Finding("note", "the prompt does not matter to it")
    else:
        share = float((own > other).mean())
        told = f"own prompt above another picture's for {share:.0%} of the pictures"
        means = f"mean {np.nanmean(own):.4g} and {np.nanmean(other):.4g}"
        state = "ok" if share >= SHARE_RIGHT else "fail"
        yield Finding(state, f"{told}, at least {SHARE_RIGHT:.0%}; {means}")
    if config.usual_range is not None:
        low, high = float(np.nanmin(own)), float(np.nanmax(own))
        least, most = config.usual_range
        state = "ok" if least <= low and high <= most else "fail"
        yield Finding(state, f"scores lie in [{low:.4g}, {high:.4g}], usual is [{least:g}, {most:g}]")


def _compared(report: VerifyReport, reference: Path | None, tolerance: float) -> Finding:
    if reference is None:
        advice = "score the pictures of --pictures with the official code and pass the numbers as --against"
        return Finding("note", f"no known scores for it: {advice}")
    known = _read_scores(reference, report)
    missing = [name for name in report.pictures if name not in known]
    if missing:
        return Finding("fail", f"{reference} has no score of {len(missing)} pictures (first: {missing[0]})")
    expected = np.array([known[name] for name in report.pictures])
    return _within(f"against {reference.name}", np.array(report.scores), expected, tolerance)


def _read_scores(file: Path, report: VerifyReport) -> Mapping[str, float]:
    """The scores of one scorer: the entry of its name, else of its type, else the only one."""
    if not file.is_file():
        raise MissingError(f"no file {file}: expected scores that `rewards verify --write` wrote")
    try:
        entries = read_json(file)["scorers"]
        named = [entry for entry in entries if entry.get("name") == report.name]
        of_type = [entry for entry in entries if entry.get("type") == report.type]
        found = next(iter([*named, *of_type, *(entries if len(entries) == 1 else [])]))
        return {str(name): float(score) for name, score in found["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise DataError(
            f"{file}: no scores of {report.name!r} in it ({type(error).__name__}: {error}); expected "
            '{"scorers": [{"type": ..., "scores": {"noto-1f525": 1.5, ...}}]}'
        ) from error


def _within(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> Finding:
    """Compare the largest difference over the mean size of the expected scores; single ones may be near 0."""
    worst = float(np.abs(found - expected).max() / (float(np.abs(expected).mean()) or 1.0))
    state = "ok" if worst <= tolerance else "fail"
    return Finding(state, f"{what}: largest relative difference {worst:.1e}, at most {tolerance:g}")


def _write_pictures(folder: Path, shown: Sequence[Picture], images: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture, pixels in zip(shown, to_bytes(images), strict=True):
        Image.fromarray(pixels).save(folder / f"{picture.name}.png")
    listed = [asdict(picture) for picture in shown]
    (folder / "prompts.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
