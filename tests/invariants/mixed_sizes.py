"""Methods through their own outer loops on a toy policy whose pictures have two sizes, for the tests of how a batch is split.

As `every_method`, in float64 and with steps that are linear in the gradient. `python -m tests.invariants.mixed_sizes FOLDER` runs
`IN_TWO_PROCESSES` as one of the processes that a launcher started.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.online.loop import Loop
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator
from diffexpo.training.distributed import World, start_world, stop_world
from diffexpo.types import Conditioning
from tests.double import in_double
from tests.invariants.every_method import BATCH, METHODS, make_config
from tests.learning.toy import PATHS, PROMPTS, make_loop, reward_of

# Those that refuse several sizes are left out.
SEVERAL_SIZES = tuple(name for name in METHODS if name != "spin")
IN_TWO_PROCESSES = ("expo", "diffusion_kto", "dgpo", "ddpo", "prdp")
SIZES = ((8, 8), (8, 16))
SHAPES = ((2, 1, 1), (2, 1, 2))


class TwoSizes(ToyPolicy):
    """Pictures of one or of two 8 x 8 squares of one colour each; the network sees each square by itself."""

    latent_shapes = SHAPES

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows, channels, height, width = x_t.shape
        squares = x_t.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
        each = torch.arange(rows).repeat_interleave(height * width)
        found = super().predict(squares, t.expand(rows)[each], conditioning.select(each))
        return found.reshape(rows, height, width, channels).permute(0, 3, 1, 2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        columns = [super(TwoSizes, self).decode_latents(column) for column in latents.split(1, dim=3)]
        return torch.cat(columns, dim=3)


def config_of(name: str, micro_batch_size: int) -> RunConfig:
    """The method's settings with two sizes."""
    values = make_config(name, micro_batch_size).model_dump(mode="json")
    values["model"]["buckets"] = [SIZES[1]]
    values["explore"]["aspect"] = "uniform"
    if name == "dpok":
        values["algorithm"]["has_value_baseline"] = False
    return RunConfig.model_validate(values)


def add_pairs(store: Store, count: int) -> None:
    """D_off: pairs of N(0, 1) latents, a third of them wide; the better one under the reward wins."""
    samples, pairs, latents = [], [], {}
    for row in range(count):
        which = int(row % 3 == 1)
        both = torch.randn(2, *SHAPES[which], generator=torch_generator("offline", row))
        order = reward_of(both.mean(dim=(2, 3))).argsort(descending=True).tolist()
        prompt = PROMPTS[row % len(PROMPTS)]
        shared = {"prompt_id": prompt.id, "prompt": prompt.text, "source": "offline"}
        ids = [f"offline-{row:04d}-{place}" for place in range(2)]
        height, width = SIZES[which]
        samples += [
            Sample(sample_id=name, agent="offline", height=height, width=width, **shared) for name in ids
        ]
        latents |= dict(zip(ids, both.numpy(), strict=True))
        winner, loser = (ids[place] for place in order)
        pairs.append(
            Pair(pair_id=f"offline-{row:04d}", winner_id=winner, loser_id=loser, judge="truth", **shared)
        )
    store.append_unit(0, 0, 0, samples, list(latents.values()), stage="offline")
    store.append_pairs(0, 0, pairs, stage="offline")
    store.write_manifest("offline", 0, {})


def run(name: str, folder: Path, *, micro_batch_size: int = BATCH, world: World | None = None) -> Loop:
    """A whole run of a method; weights and metrics stay in the folder."""
    config = config_of(name, micro_batch_size)
    path = PATHS["flow" if config.explore.sampler.name.startswith("flow") else "vp"]
    with in_double():
        if config.offline.source is not None and (world or World()).rank == 0:
            add_pairs(Store(folder / name / "store"), 24)
        loop = make_loop(config, TwoSizes(path), folder / name, world=world)
        loop.prompts = PROMPTS[:6]
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    return loop


def main(folder: Path) -> None:
    """Some methods, one after the other, on the processes that were started."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    for name in IN_TWO_PROCESSES:
        run(name, folder, micro_batch_size=BATCH // world.size, world=world)
    stop_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
