"""Trains any model of the emoji world by name; `python -m worlds.emoji train` calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL

from diffexpo.errors import ConfigError, MissingError
from diffexpo.worlds.emoji import asset_path
from worlds.emoji.offline import make_offline
from worlds.emoji.probe import train_probe
from worlds.emoji.train_diffusion import train_diffusion
from worlds.emoji.train_flow import train_flow
from worlds.emoji.train_judge import train_judge
from worlds.emoji.train_step_judge import train_step_judge
from worlds.emoji.train_vae import train_decoder, train_vae

# What needs a finished autoencoder: called with minutes, folder, seed and autoencoder.
WITH_AUTOENCODER: dict[str, Callable[[float, Path, int, AutoencoderKL], None]] = {
    "decoder": train_decoder,
    "diffusion": train_diffusion,
    "flow": train_flow,
    "judge_train": partial(train_judge, "judge_train"),
    "judge_heldout": partial(train_judge, "judge_heldout"),
    "step_judge": train_step_judge,
    "probe": train_probe,
}
WHAT = ("vae", *WITH_AUTOENCODER, "offline")


def train(what: str, minutes: float, out: Path, seed: int, vae: Path | None = None) -> None:
    """Train one model for the given number of minutes and write it as the folder `out / what`.

    Whatever lies there under that name is replaced. If `out` is the assets folder of the emoji world, the
    model takes the place of the shipped one.

    Args:
        what: vae, decoder (trains only the decoder of a finished autoencoder further, which leaves latents as
            they are), diffusion, flow, judge_train, judge_heldout, step_judge, probe, or offline (the
            preference set, which takes the time it takes: `minutes` is not used).
        minutes: wall-clock minutes of training, > 0; the schedule spans exactly these. out: the folder to
        write into. seed: seed of weights and draws. The result also depends on how many steps fit into the
        minutes. vae: the autoencoder's folder, for everything but "vae"; by default that of the shipped
        diffusion base.

    Raises:
        ConfigError: for another `what` or minutes that are not positive.
        MissingError: when the autoencoder's folder is missing.
    """
    if what not in WHAT:
        raise ConfigError(f"emoji train {what!r}: expected one of {', '.join(WHAT)}")
    if not minutes > 0:
        raise ConfigError(f"emoji train: minutes = {minutes} - expected a positive number")
    if what == "offline":
        make_offline(out / "offline.parquet", seed)
        return
    if what == "vae":
        train_vae(minutes, out / what, seed)
        return
    folder = vae or asset_path("diffusion") / "vae"
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"emoji train {what}: no autoencoder in {folder} - train one first: emoji train vae"
        )
    WITH_AUTOENCODER[what](minutes, out / what, seed, AutoencoderKL.from_pretrained(folder))
