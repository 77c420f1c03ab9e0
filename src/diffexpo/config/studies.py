"""A study's protocol from YAML and back, with messages that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import yaml
from pydantic import ValidationError

from diffexpo.config.load import parse_yaml
from diffexpo.config.people import StudyConfig
from diffexpo.errors import ConfigError


def read_study(text: str, origin: str, given: Mapping[str, object] | None = None) -> StudyConfig:
    """A protocol from YAML, with values that were given besides.

    Args:
        text: YAML, a mapping of the settings of `StudyConfig`.
        origin: File or flag, for the message.
        given: Values that come before those of the text.
    Raises:
        ConfigError: not YAML, an unknown setting, or a value that does not fit.
    """
    values = parse_yaml(text, origin)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{origin} holds a {type(values).__name__}; expected a YAML mapping of settings")
    try:
        study = StudyConfig(**{**(values or {}), **(given or {})})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_line(detail, origin) for detail in error.errors(include_url=False))
        ) from None
    if study.against is not None and study.against not in study.models:
        models = ", ".join(study.models)
        raise ConfigError(
            f"against = {study.against!r} (from {origin}): expected one of the models, {models}"
        )
    if len(set(study.questions)) < len(study.questions):
        raise ConfigError(f"questions = {list(study.questions)} (from {origin}) holds a question twice")
    if study.raters < study.votes:
        raise ConfigError(
            f"raters = {study.raters} with votes = {study.votes} (from {origin}): each vote on a pair "
            "comes from another person; expected as many raters as votes, or more"
        )
    return study


def study_to_yaml(study: StudyConfig) -> str:
    """The whole protocol as YAML."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _line(detail: Mapping[str, object], origin: str) -> str:
    place = detail["loc"]
    path = ".".join(str(part) for part in place) if isinstance(place, tuple) else str(place)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path.rpartition(".")[2], _names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{path} is not a setting of a study (from {origin}).{hint}"
    if detail["type"] == "missing":
        return f"{path} is not given (in {origin}): {StudyConfig.model_fields[path].description}"
    return f"{path} = {detail['input']!r:.60} (from {origin}): {detail['msg']}"


def _names() -> list[str]:
    found: list[str] = []
    for group in (StudyConfig, *(type(StudyConfig.model_fields["rating"].default),)):
        found += list(group.model_fields)
    return found
