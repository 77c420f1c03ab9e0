"""`diffexpo label`: people compare the images of a run or of a study."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from diffexpo import assembly
from diffexpo.assembly import MissingError, WaitingError
from diffexpo.cli.failures import boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.options import AsJson
from diffexpo.cli.progress import Console

app = typer.Typer(
    no_args_is_help=True,
    help="Let people compare images: serve the rating page, make personal links, take votes in and out.",
)
Book = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN|STUDY", help="Run folder or name, or folder of a study; default: the most recent run."
    ),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on. Another than this machine's own lets others in: use TLS.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
Certificate = Annotated[Path | None, typer.Option("--tls-cert", help="Certificate for TLS, a PEM file.")]
Key = Annotated[Path | None, typer.Option("--tls-key", help="Its private key, a PEM file.")]


def find_folder(name: str | None) -> Path:
    """The folder with what people are asked: of a study, or of a run."""
    if name is not None and Path(name).is_dir() and not (Path(name) / "config.yaml").is_file():
        return assembly.find_book(Path(name))
    try:
        return assembly.find_book(find_run(name))
    except MissingError as error:
        if name is not None and "no run" in str(error):
            raise MissingError(f"{error} Nor is it the folder of a study (`diffexpo study new`).") from None
        raise


def serve_until_stopped(folder: Path, until_complete: bool, **site: Any) -> bool:
    """Serve; True where it ended by itself, False where it was stopped."""
    # A service started in the background has SIGINT ignored by its shell; it must stop all the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        assembly.serve_rating(folder, site, lambda text: print(text, flush=True), until_complete)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return False
    return True


# Many parameters because each is an option of the command.
@app.command()
def serve(
    run: Book = None,
    host: Host = "127.0.0.1",
    port: Port = 8189,
    certificate: Certificate = None,
    key: Key = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run whenever its votes are in, until it ends.")
    ] = False,
) -> None:
    """Serve the rating page until interrupted.

    Raters come by the personal links of `diffexpo label links`. The address of the owner's page is printed:
    it shows votes, agreement and careless raters, and stops or extends the rating.
    """
    folder = find_folder(run)
    site = {"host": host, "port": port, "certificate": certificate, "key": key}
    if not resume:
        serve_until_stopped(folder, False, **site)
        return
    run_dir = find_run(run)
    while serve_until_stopped(folder, True, **site):
        print(f"every vote is in; {run_dir} goes on", flush=True)
        try:
            _resume(run_dir)
            return
        except SystemExit as end:
            if end.code != WaitingError.exit_code:
                raise


def _resume(run_dir: Path) -> None:
    from diffexpo.config.resuming import resumed_config

    loaded = resumed_config(run_dir / "config.yaml", ())
    with boundary(run_dir):
        report = assembly.run(loaded.config, run_dir, sources=loaded.sources, resume=True, console=Console())
        print(f"report: {report}", flush=True)


@app.command()
def links(
    run: Book = None,
    raters: Annotated[int, typer.Option(min=0, help="How many links for raters without a name.")] = 0,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Name of a rater, for your eyes alone. Repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.01, help="Links end after so many days.")] = None,
    site: Annotated[
        str, typer.Option(help="Address at which raters reach the page.")
    ] = "http://127.0.0.1:8189",
    revoke: Annotated[
        str | None, typer.Option(metavar="NAME", help="End this rater's link instead; given answers stay.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make personal links for raters. Each is shown this once: only a hash of it is kept."""
    folder = find_folder(run)
    if revoke is not None:
        assembly.revoke_link(folder, revoke)
        print(json.dumps({"revoked": revoke}) if as_json else f"the link of {revoke} has ended")
        return
    count = raters or (0 if name else 1)
    made = assembly.make_rater_links(folder, name or [], count, days, site)
    told = "\n".join(f"{rater}: {address}" for rater, address in made)
    print(json.dumps([{"rater": rater, "address": address} for rater, address in made]) if as_json else told)


@app.command()
def cost(
    certainty: Annotated[float, typer.Option(help="How often the votes on a pair are to be right.")] = 0.95,
    preference: Annotated[
        float, typer.Option(help="Share of people who would prefer the better image of a pair.")
    ] = 0.75,
    candidates: Annotated[int, typer.Option(min=3, max=12, help="Images of a prompt in a tournament.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Say how many votes a wanted certainty takes, before anybody is asked.

    A pair is right where most of its votes prefer the better image (exact). A tournament's best image is to
    be better than its worst one (simulated, with strengths as far apart as Bradley-Terry's posterior takes
    them to be beforehand).
    """
    rows = assembly.vote_costs(certainty, preference, candidates)
    columns = ["asked of a prompt", "votes", "how sure"]
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    Console(interactive=False).table("what votes buy", columns, rows)


@app.command()
def status(run: Book = None, as_json: AsJson = False) -> None:
    """Say how many votes are in and missing, and how careful each rater is."""
    folder = find_folder(run)
    raters = assembly.raters_of(folder)
    if as_json:
        print(json.dumps(raters, indent=2))
        return
    console = Console(interactive=False)
    console.line(assembly.describe_rating(folder))
    rows = [
        (
            one["name"],
            str(one["answers"]),
            f"{one['checks_right']} of {one['checks']}",
            f"{one['repeats_same']} of {one['repeats']}",
            "-" if one["seconds"] is None else f"{one['seconds']:.1f} s",
            "-" if one["agreement"] is None else f"{one['agreement']:.0%}",
            "; ".join(one["reasons"]),
        )
        for one in raters
    ]
    columns = ["rater", "votes", "checks right", "repeats alike", "median", "agrees", "left out because"]
    console.table("raters", columns, rows)


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN|STUDY", help="Run folder or name, or folder of a study.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .csv, .jsonl or .parquet.")],
    as_json: AsJson = False,
) -> None:
    """Write every vote without names, addresses and times of day."""
    count = assembly.export_votes(find_folder(run), target)
    told = {"answers": count, "file": str(target)}
    print(json.dumps(told) if as_json else f"{count} answers: {target}")


@app.command("import")
def import_votes(
    run: Annotated[
        str, typer.Argument(metavar="RUN|STUDY", help="Run folder or name, or folder of a study.")
    ],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Votes that were given elsewhere.")],
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="table, labelstudio, d3po, or auto: by content.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Take votes that were given elsewhere: CSV or JSON lines, Label Studio's export, D3PO's JSON."""
    told = assembly.import_votes(find_folder(run), source, kind)
    print(json.dumps({"told": told}) if as_json else told)
