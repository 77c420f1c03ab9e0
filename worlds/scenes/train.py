"""Trains any part of the world of scenes by name; `python -m worlds.scenes train` calls it."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL

from diffexpo.errors import ConfigError, MissingError
from worlds.scenes.train_checker import CHECKERS, train_checker
from worlds.scenes.train_diffusion import LEARNING_RATE, train_diffusion
from worlds.scenes.train_flow import LEARNING_RATE as FLOW_LEARNING_RATE
from worlds.scenes.train_flow import train_flow
from worlds.scenes.train_looks import JUDGES, train_looks
from worlds.scenes.train_reader import LEARNING_RATE as READER_LEARNING_RATE
from worlds.scenes.train_reader import train_reader
from worlds.scenes.train_vae import train_decoder

WHAT = ("decoder", *CHECKERS, *JUDGES, "reader", "diffusion", "flow")


def train(
    what: str,
    steps: int,
    out: Path,
    seed: int,
    vae: Path | None,
    start: Path | None,
    teacher: Path | None = None,
    learning_rate: float | None = None,
) -> None:
    """Train one part for so many steps and write it as the folder `out / what`.

    A training whose state lies beside that folder goes on from there.

    Args:
        what: one of `WHAT`; the diffusion base takes the text encoder of `out / "reader"` where there is one.
        vae: the autoencoder's folder, by default the teacher's, or else `out / "decoder"`. start: a base of
        the same kind whose weights are the start; by default it starts from nothing. teacher: a diffusion
        base that the flow base is distilled from; by default it learns from data. learning_rate: peak rate
        of a base or the reader, by default its own.

    Raises:
        ConfigError: another `what`, or a teacher of something else than the flow base. MissingError: there
        is no autoencoder in its folder, or a base is not there.
    """
    if what not in WHAT:
        raise ConfigError(f"scenes train {what!r}: expected one of {', '.join(WHAT)}")
    if teacher is not None and what != "flow":
        raise ConfigError(
            f"scenes train {what}: --teacher {teacher} - only the flow base is distilled; leave it out"
        )
    for option, base in (("--start", start), ("--teacher", teacher)):
        if base is not None and not (base / "model_index.json").is_file():
            raise MissingError(f"scenes train {what}: {option} {base} - expected the folder of a base")
    if what == "reader":
        train_reader(steps, out / what, seed, start, learning_rate or READER_LEARNING_RATE)
        return
    folder = vae or (teacher / "vae" if teacher else out / "decoder")
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"scenes train {what}: no autoencoder in {folder} - name one with --vae, such as that of a base"
        )
    autoencoder = AutoencoderKL.from_pretrained(folder)
    if what == "diffusion":
        rate = learning_rate or LEARNING_RATE
        train_diffusion(
            steps, out / what, seed, autoencoder, start, learning_rate=rate, reader=out / "reader"
        )
    elif what == "flow":
        rate = learning_rate or FLOW_LEARNING_RATE
        train_flow(steps, out / what, seed, autoencoder, start, teacher, learning_rate=rate)
    elif what == "decoder":
        train_decoder(steps, out / what, seed, autoencoder)
    elif what in JUDGES:
        train_looks(what, steps, out, autoencoder)
    else:
        train_checker(what, steps, out, autoencoder)
