"""`diffexpo data`: preference sets and prompt lists, and what a run has stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError, MissingError
from diffexpo.cli.folders import find_run
from diffexpo.cli.options import AsJson
from diffexpo.cli.progress import Console, Nowhere

app = typer.Typer(
    no_args_is_help=True,
    help="Import preference sets and prompt lists; inspect, verify, export and regenerate the data of a run.",
)
Run = Annotated[str, typer.Argument(help="Run folder or name.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Preference set: a file or folder.")]
Either = Annotated[
    str,
    typer.Argument(metavar="RUN|SOURCE", help="Run folder or name, or a preference set (a file or folder)."),
]
Kind = Annotated[
    str,
    typer.Option("--format", metavar="NAME", help="Format of the set; by default recognised by its content."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many pairs, chosen by key.")]
Seed = Annotated[int, typer.Option(help="Name of the choice that --limit or --split makes.")]


@app.command("import")
def import_pairs(
    source: Source,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder for the Parquet shards.")],
    kind: Kind = "auto",
    limit: Limit = None,
    seed: Seed = 0,
    check: Annotated[
        str,
        typer.Option(
            metavar="decode|structure",
            help="Decode both images, or only check whether their files are whole.",
        ),
    ] = "structure",
    as_json: AsJson = False,
) -> None:
    """Verify a preference set of any format and write it as Parquet in the Pick-a-Pic v2 columns; needs no
    model.

    `offline.source` takes the folder. Rows that cannot be used are counted and listed in quarantine.jsonl.
    If it is killed, the same command continues after the last complete shard.

    \b
    Formats: pickapic, hpdv2, hpdv3, imagerewarddb, folders, table, webdataset, diffexpo
    """
    if check not in ("decode", "structure"):
        raise ConfigError(f"--check {check}: expected decode or structure")
    console = Console(Nowhere() if as_json else None)
    with console.phase(f"import {source}", 0, "pairs") as bar:
        report = assembly.rewrite_pairs(
            assembly.resolve(source), to, format=kind, limit=limit, seed=seed, check=check, tick=bar.advance
        )
    if as_json:
        print(json.dumps({"folder": str(to)} | report.to_json(), indent=2))
    for line in (report.describe(), *(f"  {example}" for example in report.examples[:5])):
        console.line(line)
    console.line(f"offline.source: {to}")


@app.command()
def inspect(
    source: Either,
    pair: Annotated[
        str | None, typer.Argument(metavar="PAIR", help="A pair's id; without one the store is summed up.")
    ] = None,
    kind: Kind = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the whole history of a pair: both images, their agents, seeds, sampler, rewards, weights and
    files.

    Without a pair: what a run's store or a preference set holds, without reading all of it.
    """
    if _is_set(source):
        if pair is not None:
            reason = f"{source} is a preference set, whose pairs have no history"
            raise ConfigError(f"PAIR {pair!r}: {reason}; leave it out")
        found = assembly.inspect_offline(assembly.resolve(source), format=kind)
    else:
        found = assembly.inspect(find_run(source), pair)
    _print(found, as_json)


@app.command()
def stats(
    source: Either, kind: Kind = "auto", limit: Limit = None, seed: Seed = 0, as_json: AsJson = False
) -> None:
    """Count all in a run's store or a preference set: pairs, prompts, judges, models, sizes, bad rows."""
    if _is_set(source):
        found = assembly.summarise_offline(assembly.resolve(source), format=kind, limit=limit, seed=seed)
    else:
        found = assembly.summarise_store(assembly.Store(find_run(source) / "store", create=False))
    _print(found, as_json)


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write all pairs as one Parquet file in the Pick-a-Pic v2 columns, images included."""
    rows = assembly.export_pairs(find_run(run), target)
    print(json.dumps({"pairs": rows, "file": str(target)}) if as_json else f"{rows} pairs: {target}")


@app.command()
def verify(
    run: Annotated[
        str, typer.Argument(metavar="RUN|FOLDER", help="Run folder or name, or a folder that `import` wrote.")
    ],
    as_json: AsJson = False,
) -> None:
    """Recompute the checksum and row count of every stored file; exit code 4 if one differs."""
    if _is_set(run):
        folder, count, whose = run, assembly.verify_rewritten(run), "manifest says"
    else:
        folder, whose = str(find_run(run) / "store"), "manifests say"
        count = assembly.Store(folder, create=False).verify()
    told = json.dumps({"folder": folder, "files": count})
    print(told if as_json else f"{folder}: {count} files are as their {whose}")


@app.command()
def prompts(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Prompt list: a file, or the folder of a benchmark.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="FILE", help="File to write: .jsonl, .parquet or .txt.")
    ],
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Format of the list; `auto` goes by the ending.")
    ] = "auto",
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Only prompts of this category. Repeatable.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME=SHARE", help="Also a part by key, in FILE-NAME. Repeatable."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Bring a published prompt list into a file that `prompts.source` and `evaluation.prompts` take.

    \b
    Formats: text, jsonl, parquet, hpdv2, pickapic, partiprompts, drawbench, t2i_compbench, geneval,
    imagereward, ddpo_animals
    """
    chosen = {"categories": category or (), "shares": _shares(split or []), "seed": seed}
    lines = assembly.import_prompts(source, to, format=kind, **chosen)
    print(json.dumps(lines) if as_json else "\n".join(lines))


@app.command()
def regenerate(
    run: Run,
    sample: Annotated[str, typer.Argument(metavar="SAMPLE_ID", help="Id of a stored sample.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.png", help="Image to write.")],
    as_json: AsJson = False,
) -> None:
    """Draw an image again from its row alone and compare it with the stored latents, bit for bit."""
    _print(assembly.regenerate(find_run(run), sample, target), as_json)


def _is_set(name: str) -> bool:
    """Whether a name means a preference set: it is an alias, or it exists and is not a run folder."""
    from diffexpo.config.worlds import world_of

    if not Path(name).exists():
        return world_of(name) is not None
    try:
        find_run(name)
    except MissingError:
        return True
    return False


def _shares(texts: list[str]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ConfigError(f"--split {text!r}: expected NAME=SHARE, such as train=0.9") from None
        if not name.replace("_", "").isalnum():
            raise ConfigError(f"--split {text!r}: a part's name is letters, digits and underscores")
    return shares


def _print(found: dict[str, object], as_json: bool) -> None:
    print(json.dumps(found, indent=2, default=str) if as_json else "\n".join(_lines(found, 0)))


def _lines(value: object, indent: int) -> Iterator[str]:
    """Nested values as indented lines."""
    pad = "  " * indent
    if isinstance(value, dict):
        for key, inner in value.items():
            is_nested = isinstance(inner, (dict, list)) and bool(inner)
            yield f"{pad}{key}: {'' if is_nested or inner is None else inner}".rstrip()
            yield from _lines(inner, indent + 1) if is_nested else ()
    elif isinstance(value, list):
        for inner in value:
            lines = list(_lines(inner, indent + 1))
            yield f"{pad}- {lines[0].lstrip()}"
            yield from lines[1:]
    else:
        yield f"{pad}{value}"
