"""`diffexpo rewards`: which scorers there are, and whether one works on this machine."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.options import AsJson
from diffexpo.cli.progress import Console

app = typer.Typer(
    no_args_is_help=True,
    help="List scorers, check one against what is known of it, serve one to other machines.",
)


# Many parameters because each is an option of the command.
@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="REWARD.yaml", help="Settings of one reward, as an element of `rewards` in a recipe."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="Type of the reward, where no file is given.")
    ] = None,
    path: Annotated[str | None, typer.Option(help="Its `path`: folder, hub id or file.py:function.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name; default: the type.")] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Another than this machine's own lets others in, without a password."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8188,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Most images scored at once.")] = 64,
    wait_ms: Annotated[
        float, typer.Option(min=0.0, help="How long a batch that is not full waits for more requests.")
    ] = 5.0,
    max_mib: Annotated[float, typer.Option(min=0.01, help="Largest request that is read, MiB.")] = 64.0,
    connections: Annotated[
        int, typer.Option(min=1, help="Most connections at once; more are told to come again.")
    ] = 64,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Longest wait of a request for its scores, seconds.")
    ] = 600.0,
) -> None:
    """Serve one scorer over HTTP until interrupted; a run uses it as `type: remote`."""
    if (config is None) == (kind is None):
        expected = "either --config REWARD.yaml or --type TYPE (with --path where the type needs one)"
        raise ConfigError(f"expected {expected}")
    if config is not None and (path is not None or name is not None):
        raise ConfigError("--path and --name go with --type; with --config they stand in the file")
    given = {"type": kind, "path": path, "name": name}
    reward = assembly.read_reward(config, {key: value for key, value in given.items() if value is not None})
    server = assembly.open_server(
        reward,
        device=device,
        host=host,
        port=port,
        batch_size=batch_size,
        wait_ms=wait_ms,
        max_mib=max_mib,
        connections=connections,
        timeout_s=timeout_s,
    )
    facts = server.facts
    print(f"{facts['name']} ({facts['type']}, {facts['scale']}) at {server.url}")
    print(f"version {facts['version']}")
    print(f"in a recipe: rewards: [{{name: {facts['name']}, type: remote, path: {server.url}}}]", flush=True)
    # A service started in the background has SIGINT ignored by its shell; it must stop all the same, and on
    # SIGTERM too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.close()


@app.command("list")
def list_scorers(as_json: AsJson = False) -> None:
    """List the types of rewards: what each scores, its unit, where its weights are found, its licence."""
    from diffexpo.config.rewards import REWARDS

    if as_json:
        print(json.dumps({name: card.facts() for name, card in REWARDS.items()}, indent=2))
        return
    rows = [(name, card.what, card.unit, card.needs(), card.licence) for name, card in REWARDS.items()]
    console = Console(interactive=False)
    console.table("rewards", ["type", "what", "unit", "needs", "licence"], rows)
    console.line("check one with `diffexpo rewards verify TYPE`")


# Many parameters because each is an option of the command.
@app.command()
def verify(
    what: Annotated[
        str,
        typer.Argument(metavar="TYPE|RECIPE", help="Type of reward, or a recipe whose rewards are meant."),
    ],
    path: Annotated[str | None, typer.Option(help="Weights, as `path` of the reward.")] = None,
    base: Annotated[str | None, typer.Option(help="Model they stand on, as `base` of the reward.")] = None,
    scale: Annotated[str | None, typer.Option(help="raw, percent or logit.")] = None,
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    write: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with the scores in this JSON file.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative difference that passes.")
    ] = 1e-3,
    pictures: Annotated[
        Path | None, typer.Option(help="Write the images and captions that are scored to this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score shipped images and check the result; exit code 4 if a check fails.

    Without a reference the checks are those that every good scorer passes: finite, the same alone as in a
    batch, higher for the right caption than for another one's, within the usual range. With one (shipped for
    JPEG and the emoji judges, else `--against`, made by the official code on the images of `--pictures`)
    the scores themselves are compared.
    """
    settings = {"path": path, "base": base, "scale": scale, "precision": precision}
    reports = assembly.verify_rewards(
        what, device=device, against=against, tolerance=tolerance, pictures=pictures, **settings
    )
    if write is not None:
        assembly.write_scores(reports, write)
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        console = Console(interactive=False)
        for report in reports:
            console.table(report.title, ["picture", "prompt", "score", "other prompt"], report.rows())
            for check in report.checks:
                console.line(f" {check.state.upper():4}  {check.what}")
    assembly.require_passed(reports)
