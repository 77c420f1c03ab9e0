"""`diffexpo rewards serve`: one scorer behind HTTP, for runs on other machines or in other environments."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from diffexpo.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the group `rewards`."""
    app.command()(serve)


# Many parameters because each is an option of the command.
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
) -> None:
    """Serve one scorer over HTTP until interrupted; a run uses it as `type: remote`."""
    if (config is None) == (kind is None):
        raise ConfigError(
            "expected either --config REWARD.yaml or --type TYPE (with --path where the type needs one)"
        )
    if config is not None and (path is not None or name is not None):
        raise ConfigError("--path and --name go with --type; with --config they stand in the file")
    from diffexpo.assembly.serving import open_server, read_reward

    given = {"type": kind, "path": path, "name": name}
    reward = read_reward(config, {key: value for key, value in given.items() if value is not None})
    options = {"host": host, "port": port, "batch_size": batch_size, "wait_ms": wait_ms, "max_mib": max_mib}
    server = open_server(reward, device=device, **options)
    facts = server.facts
    print(f"{facts['name']} ({facts['type']}, {facts['scale']}) at {server.url}", flush=True)
    print(f"version {facts['version']}", flush=True)
    print(
        "in a recipe: " + f"rewards: [{{name: {facts['name']}, type: remote, path: {server.url}}}]",
        flush=True,
    )
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
