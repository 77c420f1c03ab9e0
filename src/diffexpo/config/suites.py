"""Benchmark suites: what is drawn, who judges it, and how a table is made of it. Imports without torch.

A suite is a YAML file of `diffexpo/suites` or a user's own; `Suite` says what may stand in it.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from diffexpo.bounded.yaml_texts import Value, parse_yaml, read_yaml
from diffexpo.config.rewards import REWARDS, RewardCard, RewardConfig, read_card
from diffexpo.config.schema import SamplerConfig
from diffexpo.config.section import Count, Section
from diffexpo.errors import ConfigError, MissingError

SUITES = Path(__file__).resolve().parent.parent / "suites"


class Published(Section):
    """Where a suite's prompts are given out, for those who do not have them yet."""

    where: str
    """Page or repository, and the file in it."""
    format: str
    """Name of the format that `diffexpo data prompts` reads it in."""
    licence: str
    """Licence of the prompts."""


class Suite(Section):
    """A benchmark: prompts, how they are drawn, who judges, and the rule of its table."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name; its evaluations lie in evaluations/NAME."""
    title: str
    """What it is, in a few words."""
    prompts: str
    """Prompt file, or an embedded list."""
    categories: dict[str, int] = Field(default_factory=dict)
    """Prompts of each category in the published list, in the order of the table; empty: all there are."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Draw this many of the prompts, chosen by key; null: all."""
    images_per_prompt: Count = 1
    """Images of each prompt."""
    seed: int = 0
    """Names the noise of every image and the order of the prompts."""
    batch_size: Count = 16
    """Images of one network call. Images belong to it: another size rounds differently."""
    sampler: SamplerConfig = SamplerConfig()
    """How diffusion models draw."""
    flow_sampler: SamplerConfig = SamplerConfig(name="flow_euler", steps=28, guidance=4.5)
    """How rectified-flow models draw."""
    judges: tuple[RewardConfig, ...] = ()
    """Who scores; the first one decides win rates."""
    groups: tuple[str, ...] = ("category",)
    """What the second table groups prompts by: `category`, or an attribute of the prompts."""
    rule: Literal["mean", "chunks", "tasks"] = "mean"
    """Total of a judge: the mean over prompts (`mean`), the same with the spread of ten consecutive parts of
    each category (`chunks`, HPSv2's), or the unweighted mean of the categories (`tasks`, GenEval's)."""
    published: Published | None = None
    """Where the prompts come from; null for lists that are shipped."""
    note: str = ""
    """What a reader of its numbers has to know."""

    def sampler_of(self, kind: str) -> SamplerConfig:
        """The sampler of a model with a path of this kind, "vp" or "flow"."""
        return self.flow_sampler if kind == "flow" else self.sampler

    @property
    def drawing(self) -> dict[str, object]:
        """What its images depend on besides the model and the prompts: the same values, the same images."""
        names = (
            "num_prompts",
            "images_per_prompt",
            "seed",
            "batch_size",
            "sampler",
            "flow_sampler",
        )
        return {name: value for name, value in self.model_dump(mode="json").items() if name in names}


def list_suites() -> dict[str, str]:
    """The embedded suites by name, with their titles."""
    return {path.stem: read_suite(path.stem).title for path in sorted(SUITES.glob("*.yaml"))}


def read_suite(name: str, overrides: Sequence[str] = ()) -> Suite:
    """A suite by name or by file.

    Args:
        name: An embedded suite (`scenes`), or a YAML file; a file that exists wins.
        overrides: `key=value` strings; the value is YAML, keys of groups have dots (`sampler.steps=20`).
    Raises:
        MissingError: there is neither; the nearest names are given.
        ConfigError: an unknown setting, or a value that does not fit.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = SUITES / f"{name}.yaml"
    if not path.is_file():
        names = [file.stem for file in sorted(SUITES.glob("*.yaml"))]
        near = difflib.get_close_matches(name, names)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Suites: {', '.join(names)}."
        raise MissingError(f"no suite {name!r}: neither a YAML file nor an embedded suite. {hint}")
    origin = f"suite {path.stem}"
    values = read_yaml(path, origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: {path} holds no settings; expected name, title, prompts, judges ...")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} has no value; expected --set key=value")
        _put(values, key.strip().split("."), parse_yaml(text, f"--set {override}"), override)
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        lines = [_line(detail, origin) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None
    check_judges(suite.judges)
    return suite


def read_judge(text: str) -> RewardCard:
    """A judge as it is typed: `[NAME=]TYPE[:PATH]`.

    `read_judge("looks=scene_looks:scenes:looks_heldout")` has the name "looks"; without a name it is called
    by its type.
    """
    head, equals, rest = text.partition("=")
    name, kind = (head, rest) if equals and ":" not in head else ("", text)
    kind, _, path = kind.partition(":")
    if kind not in REWARDS:
        near = difflib.get_close_matches(kind, REWARDS)
        known = f"Did you mean {' or '.join(near)}?" if near else f"Types: {', '.join(REWARDS)}."
        raise ConfigError(
            f"--judge {text!r}: no judge has the type {kind!r}; expected [NAME=]TYPE[:PATH]. {known}"
        )
    try:
        return read_card(name=name or kind, type=kind, path=path or None)
    except ValidationError as error:
        lines = [_line(detail, f"--judge {text}") for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def check_judges(judges: Sequence[RewardCard]) -> None:
    """Refuse, with a ConfigError, judges of one name, and those that do not score images."""
    names = [judge.name for judge in judges]
    for judge in judges:
        if names.count(judge.name) > 1:
            raise ConfigError(
                f"{names.count(judge.name)} judges are called {judge.name!r}: name them, NAME=TYPE:PATH"
            )
        if judge.asks_people or judge.reads == "latents" or judge.is_groupwise:
            raise ConfigError(
                f"judge {judge.name!r}: type {judge.type} does not score an image by itself; expected a "
                "scorer of images"
            )


def _put(values: dict[str, Value], keys: Sequence[str], value: Value, override: str) -> None:
    group = values
    for key in keys[:-1]:
        inner = group.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {key} is no group of settings; set it whole")
        group = inner
    group[keys[-1]] = value


def _line(detail: object, origin: str) -> str:
    assert isinstance(detail, dict)
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, Suite.model_fields, 1)
        hint = f" Did you mean {near[0]}?" if near else f" Settings: {', '.join(Suite.model_fields)}."
        return f"{path} is not a setting of a suite (in {origin}).{hint}"
    return f"{path} = {detail['input']!r:.60} (in {origin}): {detail['msg']}"
