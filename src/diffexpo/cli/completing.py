"""What a shell offers when the Tab key is pressed: recipes, runs and their iterates, settings. Without torch;
an offer never fails, it is empty then."""

from __future__ import annotations

from pathlib import Path

from diffexpo.cli.folders import RUNS, list_runs


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Embedded recipes with their summaries, and YAML files of this folder."""
    from diffexpo.config import list_recipes

    files = [(path.name, "file") for path in sorted(Path.cwd().glob("*.yaml"))]
    known = [(recipe.name, recipe.summary) for recipe in list_recipes()]
    return [offer for offer in [*known, *files] if offer[0].startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Runs of `runs/`, the most recent first; behind RUN@ the iterates that it has trained."""
    runs = list(reversed(list_runs(RUNS))) if RUNS.is_dir() else []
    name, mark, _ = incomplete.partition("@")
    if not mark:
        return [run.name for run in runs if run.name.startswith(incomplete)]
    files = sorted((RUNS / name / "checkpoints").glob("weights-*.safetensors"))
    numbers = [int(file.stem.removeprefix("weights-")) for file in files]
    return [offer for number in numbers if number and (offer := f"{name}@{number}").startswith(incomplete)]


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """Settings as `--set` takes them, `training.steps=`, with the first line of what each does."""
    from diffexpo.config.explain import settings

    if "=" in incomplete:
        return []
    found = {f"{one.path}=": one.text.partition("\n")[0] for one in settings() if "[]" not in one.path}
    return [(name, text) for name, text in found.items() if name.startswith(incomplete)]
