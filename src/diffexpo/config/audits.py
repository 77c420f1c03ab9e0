"""The protocol of an audit: shipped ones by name, or a file; what is missing in it. Imports without torch."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffexpo.bounded.yaml_texts import read_yaml_text
from diffexpo.config.audit import AuditConfig
from diffexpo.config.rewards import RewardCard
from diffexpo.config.rewards.balance import PLACES, wrong_places
from diffexpo.config.studies import read_protocol
from diffexpo.errors import ConfigError, MissingError

_SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "audits"
NO_LABELS = "none"
"""Value of `labelled` that corrects nothing."""


def shipped_audits() -> list[str]:
    """Names of the protocols that the package ships."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_audit(name: str, overrides: Sequence[str] = ()) -> AuditConfig:
    """A protocol by name or file, with `a.b=value` overrides.

    Raises:
        MissingError: neither a shipped protocol nor a file. ConfigError: a setting is wrong or missing.
    """
    path = _SHIPPED / f"{name}.yaml" if name in shipped_audits() else Path(name).expanduser()
    if not path.is_file():
        raise MissingError(
            f"{name}: neither a file nor a shipped protocol; there are {', '.join(shipped_audits())}"
        )
    origin = f"audit {name}" if name in shipped_audits() else str(path)
    audit = read_protocol(AuditConfig, read_yaml_text(path), origin, None, overrides)
    problems = [*_problems(audit), *_problems_of_scorers(audit)]
    if problems:
        raise ConfigError("\n".join(f"{problem} ({origin})" for problem in problems))
    return audit


def scorers_of(audit: AuditConfig) -> dict[str, list[RewardCard]]:
    """Every scorer of an audit, by the setting that names it."""
    single = {"classifier": audit.classifier, "readable": audit.readable}
    found = {key: [] if card is None else [card] for key, card in single.items()}
    return found | {"judges": list(audit.judges), "safety.classifiers": list(audit.safety.classifiers)}


def _problems(audit: AuditConfig) -> Iterator[str]:
    has_bias = bool(audit.attributes) and audit.prompts is not None
    if has_bias and audit.classifier is None and not audit.safety.classifiers:
        yield (
            "classifier is not given: nobody says what an image shows; name a CLIP or vision-language model, "
            "e.g. --set 'classifier={name: reader, type: clip, path: FOLDER}'"
        )
    if has_bias and audit.classifier is not None and audit.labelled is None:
        yield (
            "labelled is not given: the classifier's error is unknown, and a biased one is no witness; name "
            "a folder with labels.jsonl, or say --set labelled=none, and the report will say so"
        )
    if not audit.safety.classifiers and not has_bias:
        yield "neither attributes of prompts nor safety.classifiers are given: nothing would be measured"
    if audit.safety.classifiers and audit.safety.neutral is None and audit.safety.provoking is None:
        yield "safety.classifiers without safety.neutral or safety.provoking: nothing is drawn; name a list"
    for name, attribute in audit.attributes.items():
        if len(set(attribute.values.values())) < len(attribute.values):
            yield f"attributes.{name}.values: expected a different text for each value"
        wrong = [place for text in attribute.values.values() for place in wrong_places(text)]
        if wrong:
            expected = " or ".join(f"{{{place}}}" for place in PLACES)
            yield f"attributes.{name}.values: {{{wrong[0]}}} stands for nothing; expected {expected}"
        for group, mix in attribute.reference.items():
            unknown = sorted(set(mix) - set(attribute.values))
            if unknown:
                yield (
                    f"attributes.{name}.reference.{group} names {', '.join(unknown)}; expected the values "
                    f"{', '.join(attribute.values)}"
                )
            if not math.isclose(sum(mix.values()), 1.0, abs_tol=1e-3):
                yield f"attributes.{name}.reference.{group} sums to {sum(mix.values()):g}; expected 1"


def _problems_of_scorers(audit: AuditConfig) -> Iterator[str]:
    for key, cards in scorers_of(audit).items():
        for card in cards:
            if card.asks_people or card.is_groupwise or card.reads != "images" or card.stands_on:
                yield f"{key}: type {card.type} does not score one image for a text; name another scorer"
            if card.path_is and card.chosen_path is None and card.pickled_entry is None:
                yield f"{key}: type {card.type} needs path: {card.path_is}"
