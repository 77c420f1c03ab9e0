"""What `baseline.contenders` names, as settings: recipes that are trained beside a run, and finished runs.
Imports without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffexpo.config.iterates import split_iterate
from diffexpo.config.load import load_config, read_resolved
from diffexpo.config.rules import check_combinations
from diffexpo.config.run import RunConfig
from diffexpo.config.schema import BaselineConfig, ValidationConfig
from diffexpo.errors import ConfigError, MissingError

KEY = "baseline.contenders"
SHARED = ("seed", "model", "tuning", "prompts", "rewards", "mixture", "evaluation")
"""Groups that a contender takes from the run."""
RESERVED = ("eval", "baseline", "base")
START = "contender:"
"""Before the name of a contender in `tuning.start`."""


@dataclass(frozen=True)
class Contender:
    """A model to compare a run with: its settings, and its folder where it is a finished run, with the
    iteration that was asked for (None: what the run kept)."""

    name: str
    config: RunConfig
    finished: Path | None = None
    iteration: int | None = None


def read_contenders(config: RunConfig) -> list[Contender]:
    """Every contender of a run, in order.

    Raises:
        MissingError: there is neither a recipe nor a run of the name.
        ConfigError: its settings do not go with the run's; two have one name; it needs an improvement model
            or a step-aware judge, which a run has one of.
    """
    found: dict[str, Contender] = {}
    for item in config.baseline.contenders:
        contender = _read(item, config)
        if contender.name in found or contender.name in RESERVED or contender.name.startswith("base-"):
            raise ConfigError(
                f"{KEY} = {item!r}: the name {contender.name!r} is taken; contenders are told apart by the "
                "name in their recipe, or by their folder"
            )
        found[contender.name] = contender
    start = start_contender(config)
    if start is not None and start not in found:
        raise ConfigError(
            f"tuning.start = {config.tuning.start!r}: the run has no contender of that name; expected "
            + (", ".join(START + name for name in found) or f"one in {KEY}, which is empty")
        )
    return list(found.values())


def start_contender(config: RunConfig) -> str | None:
    """The contender that training starts from, of `tuning.start = "contender:NAME"`; None for any other."""
    start = config.tuning.start or ""
    return start.removeprefix(START) if start.startswith(START) else None


def known_contenders(config: RunConfig) -> Iterator[Contender]:
    """The contenders whose recipe or folder is still there."""
    for item in config.baseline.contenders:
        try:
            yield _read(item, config)
        except (ConfigError, MissingError):
            continue


def _read(item: str, config: RunConfig) -> Contender:
    named, iteration = split_iterate(item)
    folder = Path(named).expanduser()
    is_run = (folder / "config.yaml").is_file()
    other = read_resolved(folder / "config.yaml").config if is_run else load_config([item], (), {}).config
    name = other.name
    if is_run:
        name = folder.resolve().name + ("" if iteration is None else f"@{iteration}")
    card = other.algorithm
    if not is_run and (card.improvement is not None or card.branches is not None):
        raise ConfigError(
            f"{KEY} = {item!r}: {card.title} needs models of its own beside the policy; run it alone, and "
            "name the folder of that run"
        )
    shared = {group: getattr(config, group) for group in SHARED}
    if start_contender(config) is not None:
        shared["tuning"] = config.tuning.model_copy(update={"start": None})
    shared["evaluation"] = config.evaluation.model_copy(
        update={"every_iteration": False, "base_guidances": ()}
    )
    # Images are evaluated in batches of the run's size; nothing is validated here.
    plain = {"keep": "last", "patience": None, "validation": ValidationConfig()}
    explore = other.explore.model_copy(update=plain | {"batch_size": config.explore.batch_size})
    merged = other.model_copy(update=shared | {"explore": explore, "baseline": BaselineConfig()})
    try:
        check_combinations(merged)
    except ConfigError as error:
        raise ConfigError(f"{KEY} = {item!r}, with what it shares with the run: {error}") from error
    return Contender(name, merged, folder if is_run else None, iteration)
