"""Trains any part of the world of scenes by name; `python -m worlds.scenes train` calls it."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL

from diffexpo.errors import ConfigError, MissingError
from worlds.scenes.train_checker import CHECKERS, train_checker
from worlds.scenes.train_diffusion import LEARNING_RATE, train_diffusion
from worlds.scenes.train_vae import train_decoder

WHAT = ("decoder", *CHECKERS, "diffusion")


def train(
    what: str,
    steps: int,
    out: Path,
    seed: int,
    vae: Path | None,
    start: Path | None,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train one part for so many steps and write it as the folder `out / what`.

    A training whose state lies beside that folder goes on from there.

    Args:
        what: one of `WHAT`. vae: the autoencoder's folder, by default `out / "decoder"`. start: a base whose
        weights the diffusion base starts from; by default it starts from nothing. learning_rate: peak rate
        of the diffusion base.

    Raises:
        ConfigError: another `what`. MissingError: there is no autoencoder in its folder.
    """
    if what not in WHAT:
        raise ConfigError(f"scenes train {what!r}: expected one of {', '.join(WHAT)}")
    folder = vae or out / "decoder"
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"scenes train {what}: no autoencoder in {folder} - name one with --vae, such as that of a base"
        )
    autoencoder = AutoencoderKL.from_pretrained(folder)
    if what == "diffusion":
        train_diffusion(steps, out / what, seed, autoencoder, start, learning_rate=learning_rate)
    elif what == "decoder":
        train_decoder(steps, out / what, seed, autoencoder)
    else:
        train_checker(what, steps, out, autoencoder)
