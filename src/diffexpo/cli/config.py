"""`diffexpo config`: what the settings are, where each value comes from, what each means."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo.assembly import ConfigError
from diffexpo.cli.completing import recipe_names
from diffexpo.cli.options import AsJson, Set
from diffexpo.cli.progress import Console

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

app = typer.Typer(no_args_is_help=True, help="Show settings, their origin and their meaning.")


@app.command()
def show(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipes or YAML files, merged left to right; none: the defaults.",
            autocompletion=recipe_names,
        ),
    ] = None,
    sources: Annotated[bool, typer.Option("--sources", help="Tell the origin of every value.")] = False,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Print the whole resolved configuration as YAML."""
    from diffexpo.config import config_notes, config_to_yaml, load_config

    loaded = load_config(recipes or (), overrides or ())
    if as_json:
        found = loaded.config.model_dump(mode="json")
        print(json.dumps({"config": found} | ({"sources": loaded.sources} if sources else {}), indent=2))
    elif sources:
        for line in _annotated(loaded.config.model_dump(mode="json"), loaded.sources, "", 0):
            print(line)
    else:
        print(config_to_yaml(loaded.config), end="")
    for note in [*loaded.notes, *config_notes(loaded.config)]:
        typer.echo(f"warning: {note}", err=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe (editors complete and check YAML by it).

    \b
    diffexpo config schema > diffexpo.schema.json
    and in a recipe: # yaml-language-server: $schema=diffexpo.schema.json
    """
    from diffexpo.config.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def fields(
    prefix: Annotated[
        str, typer.Argument(metavar="GROUP", help="Only the settings of one group, e.g. training.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List every setting: what it accepts, its default, what it does."""
    from diffexpo.config.explain import settings, suggest_setting

    inside = (f"{prefix}.", f"{prefix}[]") if prefix else ("",)
    chosen = [setting for setting in settings() if setting.path == prefix or setting.path.startswith(inside)]
    if not chosen:
        raise ConfigError(f"{prefix} is not a setting or a group of settings.{suggest_setting(prefix)}")
    if as_json:
        print(json.dumps([asdict(setting) for setting in chosen], indent=2))
        return
    console = Console(interactive=False)
    for setting in chosen:
        console.line(f"{setting.label}: {setting.expected} (default {json.dumps(setting.default)})")
        if setting.text:
            console.line(f"    {setting.text}")


def _annotated(
    value: Mapping[str, object], sources: Mapping[str, str], path: str, indent: int
) -> Iterator[str]:
    """YAML lines with the origin of every leaf as a comment."""
    pad = "  " * indent
    for key, inner in value.items():
        here = f"{path}.{key}" if path else key
        if isinstance(inner, dict) and inner:
            yield f"{pad}{key}:"
            yield from _annotated(inner, sources, here, indent + 1)
        elif isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner):
            yield f"{pad}{key}:"
            for index, item in enumerate(inner):
                lines = list(_annotated(item, sources, f"{here}.{index}", indent + 2))
                yield f"{pad}  - {lines[0].lstrip()}"
                yield from lines[1:]
        else:
            yield f"{pad}{key}: {_flow(inner)}  # {' '.join(sources[here].split())}"


def _flow(value: object) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
