"""Trains any model of the emoji world by name: what `diffexpo emoji train` calls."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL

from diffexpo.emoji.dataset import asset_path
from diffexpo.emoji.offline import make_offline
from diffexpo.emoji.probe import train_probe
from diffexpo.emoji.train_diffusion import train_diffusion
from diffexpo.emoji.train_flow import train_flow
from diffexpo.emoji.train_judge import train_judge
from diffexpo.emoji.train_step_judge import train_step_judge
from diffexpo.emoji.train_vae import train_decoder, train_vae
from diffexpo.errors import ConfigError, MissingError

WHAT = (
    "vae",
    "decoder",
    "diffusion",
    "flow",
    "judge_train",
    "judge_heldout",
    "step_judge",
    "probe",
    "offline",
)


def train(what: str, minutes: float, out: Path, seed: int, vae: Path | None = None) -> None:
    """Train one model for so many minutes and write it as the folder `out / what`.

    What lies there under that name is replaced. With `out` = the assets folder of the emoji world a model
    takes the place of the shipped one.

    Args:
        what: vae, decoder (a longer training of a finished autoencoder's decoder alone, which leaves latents
            as they are), diffusion, flow, judge_train, judge_heldout, step_judge, probe, or offline (the
            preference set, whose making takes the time it takes: `minutes` is not used).
        minutes: wall-clock minutes of training, > 0; the schedule spans exactly these.
        out: the folder to write into.
        seed: of weights and draws. The result also depends on how many steps fit into the minutes.
        vae: the autoencoder's folder, for everything but "vae"; by default the one of the shipped diffusion
            base.

    Raises:
        ConfigError: for another `what` or minutes that are not positive.
        MissingError: when the autoencoder's folder is missing.
    """
    if what not in WHAT:
        raise ConfigError(f"emoji train {what!r}: expected one of {', '.join(WHAT)}")
    if not minutes > 0:
        raise ConfigError(f"emoji train: minutes = {minutes} - expected a positive number")
    target = out / what
    if what == "vae":
        train_vae(minutes, target, seed)
        return
    if what == "offline":
        make_offline(out / "offline.parquet", seed)
        return
    folder = vae or asset_path("diffusion") / "vae"
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"emoji train {what}: no autoencoder in {folder} - train one first: emoji train vae"
        )
    autoencoder = AutoencoderKL.from_pretrained(folder)
    if what == "decoder":
        train_decoder(minutes, target, seed, autoencoder)
    elif what == "diffusion":
        train_diffusion(minutes, target, seed, autoencoder)
    elif what == "flow":
        train_flow(minutes, target, seed, autoencoder)
    elif what == "probe":
        train_probe(minutes, target, seed, autoencoder)
    elif what == "step_judge":
        train_step_judge(minutes, target, seed, autoencoder)
    else:
        train_judge(what, minutes, target, seed, autoencoder)
