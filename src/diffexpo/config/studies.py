"""Protocols, of a study or an audit, from YAML and back, with messages that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from diffexpo.bounded.yaml_texts import parse_yaml
from diffexpo.config.people import StudyConfig
from diffexpo.config.section import Section
from diffexpo.errors import ConfigError

Protocol = TypeVar("Protocol", bound=Section)


def read_protocol(
    schema: type[Protocol],
    text: str,
    origin: str,
    given: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> Protocol:
    """A protocol from YAML, with values that were given besides.

    Args:
        schema: Its settings.
        text: YAML, a mapping of the settings.
        origin: File or flag, for the message.
        given: Values that come before those of the text.
        overrides: `a.b=value` strings of `--set`, which come before both.
    Raises:
        ConfigError: not YAML, an unknown setting, or a value that does not fit.
    """
    values = parse_yaml(text, origin)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{origin} holds a {type(values).__name__}; expected a YAML mapping of settings")
    merged: dict[str, Any] = {**(values or {}), **(given or {})}
    for override in overrides:
        _override(merged, override)
    try:
        return schema(**merged)
    except ValidationError as error:
        lines = (_line(detail, origin, schema) for detail in error.errors(include_url=False))
        raise ConfigError("\n".join(lines)) from None


def _override(values: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` in its place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} has no value; expected --set group.key=value")
    *groups, name = key.strip().split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {group} is a single value, it holds no {name!r}")
    values[name] = parse_yaml(text, f"--set {override}")


def read_study(text: str, origin: str, given: Mapping[str, object] | None = None) -> StudyConfig:
    """The protocol of a study, as `read_protocol` reads it.

    Raises:
        ConfigError: it is wrong.
    """
    study = read_protocol(StudyConfig, text, origin, given)
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


def protocol_to_yaml(protocol: Section) -> str:
    """The whole protocol as YAML."""
    return yaml.safe_dump(protocol.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _line(detail: Mapping[str, object], origin: str, schema: type[Section]) -> str:
    place = detail["loc"]
    path = ".".join(str(part) for part in place) if isinstance(place, tuple) else str(place)
    what = schema.__name__.removesuffix("Config").lower()
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path.rpartition(".")[2], _names(schema), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return (
            f"{path} is not a setting of {'an' if what[0] in 'aeiou' else 'a'} {what} (from {origin}).{hint}"
        )
    if detail["type"] == "missing":
        described = schema.model_fields.get(path)
        return f"{path} is not given (in {origin})" + (f": {described.description}" if described else "")
    return f"{path} = {detail['input']!r:.60} (from {origin}): {detail['msg']}"


def _names(schema: type[BaseModel]) -> list[str]:
    """Names of all settings, those of groups too."""
    found: list[str] = []
    for name, field in schema.model_fields.items():
        found.append(name)
        if isinstance(field.default, BaseModel):
            found += _names(type(field.default))
    return found
