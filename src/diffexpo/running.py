"""Runs from Python: `run = diffexpo.run("scenes/quick", seed=1)`, and what a run holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexpo import assembly
from diffexpo.cli.folders import RUNS, find_run, free_folder, is_finished, run_state
from diffexpo.cli.progress import Console, Nowhere
from diffexpo.config import LoadedConfig, RunConfig, load_config, read_resolved
from diffexpo.config.iterates import split_iterate
from diffexpo.config.resuming import resumed_config, unused_changes
from diffexpo.config.rewards import RewardCard, read_card
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, Interrupted, MissingError
from diffexpo.given import FOLDER, as_settings, path_of_function

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

    from diffexpo.assembly import RunComparison
    from diffexpo.data.store import Store
    from diffexpo.evaluation.metrics import WinRate
    from diffexpo.evaluation.summary import Summary
    from diffexpo.types import Policy, Reward


# Many parameters because each is an independent choice of the caller, all by keyword.
def run(
    *recipes: str | Path,
    settings: Mapping[str, object] | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    stop_after: str | None = None,
    on_stage: Callable[[int, int, str], None] | None = None,
    on_step: Callable[[int, int, Mapping[str, float | None]], None] | None = None,
    on_images: Callable[[str, Any, Sequence[str]], None] | None = None,
    quiet: bool = False,
    accept_changes: bool = False,
    **more: object,
) -> Run:
    """Run recipes, or go on with a run, as `diffexpo run` does: the same settings give the same weights.

    Args:
        recipes: Embedded recipes (`diffexpo recipes`) or YAML files, merged left to right.
        settings: Settings on top, nested or by dotted path: `{"training.steps": 3}`. Rewards, judges and
            `algorithm` may be functions (docs/python.md), prompts may be lists of texts.
        name: Name of the run; its folder is `runs/NAME`. Without one a recipe's own name gets the next free
            number.
        out: Folder of the run, instead.
        resume: A run to go on with, by folder or name; it takes no recipes and no name.
        stop_after: Stop after this stage, such as "collect-1".
        on_stage: Called with (number from 1, how many, name) before each stage.
        on_step: Called with (iteration, step, metrics by name) after each optimiser step.
        on_images: Called with (version, images (N,H,W,3) uint8, their prompts) after each evaluation.
        quiet: Print nothing; log.txt has everything.
        accept_changes: Go on although settings, code or files are not those that the run began with; the
            change is recorded in inputs.json and said in the report.
        more: Settings by name, with two underscores for a dot: `seed=1, training__steps=3`.
    Returns:
        The run, finished unless `stop_after` was given.
    Raises:
        Interrupted: by Ctrl-C; `diffexpo.run(resume=FOLDER)` goes on.
        DiffexpoError: what the command would end with, see `diffexpo.errors`.
    """
    given = {**(settings or {}), **more}
    if resume is not None:
        if recipes or name is not None or out is not None:
            raise ConfigError(
                "resume goes on with one run: expected neither recipes nor name nor out beside it"
            )
        folder = find_run(str(resume))
        loaded = resumed_config(folder / "config.yaml", _overrides(given, folder.parent / FOLDER))
        if is_finished(folder):
            for text in unused_changes(folder / "config.yaml", loaded.config):
                warnings.warn(text, stacklevel=2)
            return Run(folder)
    else:
        loaded, folder = _start(recipes, given, name, None if out is None else Path(out))
    watching = assembly.Watching(on_stage, on_step, on_images)
    try:
        assembly.run(
            loaded.config,
            folder,
            sources=loaded.sources,
            resume=resume is not None,
            console=Console(Nowhere() if quiet else None),
            stop_after=stop_after,
            watching=watching,
            accept_changes=accept_changes,
        )
    except Interrupted as error:
        error.add_note(f"go on with diffexpo.run(resume={str(folder)!r})")
        raise
    return Run(folder)


def open_run(path: str | Path) -> Run:
    """An existing run by folder or name, or one of its iterates: `open_run("runs/expo@2")`."""
    name, iteration = split_iterate(str(path))
    return Run(find_run(name), iteration)


def compare(
    *runs: str | Path | Run, judge: str | None = None, out: str | Path | None = None
) -> RunComparison:
    """Put runs beside each other, as `diffexpo compare` does.

    Args:
        runs: Folders, names, or runs.
        judge: Held-out judge that decides; default: the first that all share.
        out: Folder for the page and its data; without one nothing is written.
    Raises:
        See `diffexpo.evaluation.comparison.compare_runs`.
    """
    folders = [run.folder if isinstance(run, Run) else find_run(str(run)) for run in runs]
    found: RunComparison = assembly.compare_runs(folders, judge=judge)
    if out is not None:
        assembly.write_comparison(found, Path(out))
    return found


def load_policy(
    model: str | Path | ModelConfig, tuning: TuningConfig | None = None, *, seed: int = 0, **settings: Any
) -> Policy:
    """A base model with trainable weights on it.

    Args:
        model: A diffusers folder, a hub id, an embedded model such as "scenes:diffusion", a run or an iterate
            of one ("runs/expo@2"), or settings.
        tuning: LoRA or full fine-tuning; default: `TuningConfig(kind="lora")`.
        seed: Keys the LoRA factors.
        settings: Of `ModelConfig`, where `model` is a name, such as `dtype="bfloat16"`.
    Raises:
        See `diffexpo.policies.base.load_policy`.
    """
    from diffexpo.policies.base import load_policy as load

    if isinstance(model, (str, Path)):
        model = ModelConfig(path=str(model), **settings)
    assembly.write_model(model.path)
    path = assembly.resolve_model(model.path)
    return load(model, tuning or TuningConfig(kind="lora"), folder_or_id=path, seed=seed)


def load_rewards(
    rewards: Sequence[str | Mapping[str, Any] | RewardCard | Callable[..., object]], device: str = "cpu"
) -> list[Reward]:
    """Scorers, ready to `score(images, prompts)`.

    Args:
        rewards: Each a type ("jpeg_compressibility"), settings as in a recipe ({"name": ..., "type": ...,
            "path": "scenes:checker_train"}), or a function of one's own.
        device: Where networks run.
    Raises:
        See `diffexpo.rewards.base.load_rewards`.
    """
    from diffexpo.rewards.base import load_rewards as load

    cards = [_card(reward) for reward in rewards]
    return load(cards, assembly.resolve, device)


class Run:
    """A run's folder, finished or not, and what it holds; with `iteration` one of its iterates.

    `str(run)` is what settings take as a start or contender: the folder, or FOLDER@2.
    """

    def __init__(self, folder: Path, iteration: int | None = None) -> None:
        if not (folder / "config.yaml").is_file():
            raise MissingError(f"{folder} is no run folder: it has no config.yaml")
        self.folder, self.iteration = folder, iteration

    def __repr__(self) -> str:
        return f"Run({str(self)!r}, {self.state})"

    def __str__(self) -> str:
        return str(self.folder) if self.iteration is None else f"{self.folder}@{self.iteration}"

    @property
    def state(self) -> str:
        """running, interrupted, stopped, failed, finished or unknown."""
        return run_state(self.folder)

    @cached_property
    def config(self) -> RunConfig:
        """All settings."""
        return read_resolved(self.folder / "config.yaml").config

    @property
    def store(self) -> Store:
        """Everything that was drawn, scored and paired."""
        return assembly.Store(self.folder / "store", create=False)

    @property
    def summary(self) -> Summary:
        """The numbers of the report, read from the run's files now."""
        from diffexpo.evaluation.records import load_run
        from diffexpo.evaluation.summary import summarise

        version = None if self.iteration is None else f"iteration-{self.iteration}"
        return summarise(load_run(self.folder), version)

    @property
    def win_rate(self) -> WinRate | None:
        """How often the held-out judge prefers the result to the base; None where that was not measured."""
        summary = self.summary
        return summary.wins.get(summary.final or "")

    @property
    def report(self) -> Path:
        """report.html, written anew if it is not there."""
        path = self.folder / "report.html"
        return path if path.is_file() else assembly.write_report(self.folder)

    def pairs(self, iteration: int | None = None) -> pa.Table:
        """Preference pairs of the store as an Arrow table (`.to_pandas()`), of one collection or of all."""
        from diffexpo.data.rows import to_table

        return to_table(self.store.pairs(iteration), "pairs", {})

    def samples(self, iteration: int | None = None) -> pa.Table:
        """Images that were drawn or given, one row each, without pixels, as an Arrow table."""
        from diffexpo.data.rows import to_table

        return to_table(self.store.samples(iteration), "samples", {})

    def metrics(self, phase: str | None = None) -> pa.Table:
        """The lines of metrics.jsonl as an Arrow table, of one phase ("train", "collect", ...) or all."""
        from diffexpo.data.rows import table_of
        from diffexpo.training.metrics import read_metrics

        lines = read_metrics(self.folder / "metrics.jsonl")
        return table_of([line for line in lines if phase in (None, line.get("phase"))])

    def images(self, version: str | None = None) -> list[tuple[str, Image]]:
        """(prompt, image) of an evaluated version: "base", "iteration-2", ...; default: the run's result."""
        from PIL import Image

        from diffexpo.evaluation.records import load_suite

        chosen = version or self.summary.final or "base"
        suite = load_suite(self.folder / "eval" / chosen)
        prompts = [suite.prompts[index].text for index in suite.prompt_index]
        return [(text, Image.fromarray(pixels)) for text, pixels in zip(prompts, suite.images, strict=True)]

    def iterate(self, iteration: int) -> Run:
        """An iterate of this run; a MissingError if it is not trained."""
        from diffexpo.assembly.folders import result_path

        result_path(self.folder, self.config, f"iterate({iteration})", iteration)
        return Run(self.folder, iteration)

    def policy(self) -> Policy:
        """The model with this run's result, or this iterate, in "current"."""
        from diffexpo.assembly.actions import load_weights, open_run
        from diffexpo.online.keeping import kept_iterate

        config, store, policy = open_run(self.folder)
        chosen = kept_iterate(config, store.root) if self.iteration is None else self.iteration
        load_weights(self.folder, policy, chosen, "current")
        return policy

    def export(self) -> list[Path]:
        """Files for plain diffusers, reloaded there and compared, and the model card."""
        return assembly.export(self.folder, iteration=self.iteration)


def _start(
    recipes: Sequence[str | Path], given: Mapping[str, object], name: str | None, out: Path | None
) -> tuple[LoadedConfig, Path]:
    """Settings and folder of a new run, as the command chooses them."""
    if not recipes:
        raise ConfigError('no recipe given: expected one, e.g. diffexpo.run("scenes/quick")')
    named = {} if name is None else {"name": name}
    folder = (RUNS if out is None else out.parent) / FOLDER
    loaded = load_config(list(recipes), _overrides({**given, **named}, folder))
    if out is not None:
        return loaded, out
    chosen = loaded.config.name
    return loaded, RUNS / chosen if "name" in {**given, **named} else free_folder(chosen)


def _overrides(given: Mapping[str, object], folder: Path) -> list[str]:
    """Settings of a session as `--set` takes them."""
    return [f"{path}={json.dumps(value)}" for path, value in as_settings(given, folder)]


def _card(reward: str | Mapping[str, Any] | RewardCard | Callable[..., object]) -> RewardCard:
    if isinstance(reward, RewardCard):
        return reward
    if callable(reward):
        own = getattr(reward, "__name__", "reward")
        return read_card(name=own, type="python", path=path_of_function(reward, RUNS / FOLDER))
    if isinstance(reward, str):
        return read_card(name=reward, type=reward)
    return read_card(**{"name": reward.get("type"), **reward})
