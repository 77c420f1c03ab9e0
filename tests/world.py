"""A whole run in seconds: a tiny diffusers folder with random weights, real commands, real files.

The fixtures are shared: a folder of tests re-exports them in its conftest.
"""

from __future__ import annotations

import hashlib
import io
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.commands import diffexpo
from tests.tiny import tiny_diffusion

Weights = dict[str, np.ndarray]

RECIPE = """\
name: tiny
seed: 7
model: {{path: {model}, device: cpu}}
prompts: {{source: {root}/prompts.txt}}
offline: {{source: {root}/offline.parquet}}
explore:
  iterations: 3
  prompts_per_iteration: 4
  images_per_prompt: 2
  batch_size: 4
  sampler: {{name: ddim, steps: 3, guidance: 2.0, eta: 1.0}}
  negatives: {{source: {root}/negatives.txt, schedule: linear, initial: 0.9}}
rewards:
  - {{name: brightness, type: python, path: "{root}/rewards.py:brightness"}}
  - {{name: kilobytes, type: jpeg_incompressibility, weight: 0.5}}
algorithm: {{type: expo, beta: 200.0, alpha: 0.1, contrast_fraction: 0.5}}
training:
  steps: 6
  batch_size: 4
  micro_batch_size: 2
  learning_rate: 1.0e-3
  checkpoint_every: 2
evaluation:
  prompts: {root}/heldout.txt
  num_prompts: 3
  sampler: {{name: ddim, steps: 3, guidance: 2.0}}
  judges: [{{name: redness, type: python, path: "{root}/rewards.py:redness"}}]
  kl_prompts: 2
  vendi_prompts: 0
  bootstrap: 200
  grid_prompts: 2
"""

REWARDS = """\
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3)).tolist()


def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2)).tolist()
"""


def jpeg(generator: np.random.Generator, side: int) -> bytes:
    pixels = generator.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a recipe, a model, prompts, negatives, rewards and offline pairs."""
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> Path:
    """`world` in a folder that is there."""
    model = tiny_diffusion(root / "model", levels=1)
    generator = np.random.default_rng(0)
    prompts = [f"thing {index}" for index in range(9)]
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (root / "heldout.txt").write_text("unseen 1\nunseen 2\nunseen 3\n")
    (root / "negatives.txt").write_text("dark\nblurry\n")
    (root / "rewards.py").write_text(REWARDS)
    rows = 12
    table = {
        "caption": [prompts[index % 9] for index in range(rows)],
        "jpg_0": [jpeg(generator, 16) for _ in range(rows)],
        "jpg_1": [jpeg(generator, 16) for _ in range(rows)],
        "label_0": [float(index % 2) for index in range(rows)],
        "label_1": [float(1 - index % 2) for index in range(rows)],
        "has_label": [True] * rows,
        "are_different": [True] * rows,
        "image_0_uid": [f"a{index}" for index in range(rows)],
        "image_1_uid": [f"b{index}" for index in range(rows)],
        "best_image_uid": [f"{'ba'[index % 2]}{index}" for index in range(rows)],
        "model_0": ["made"] * rows,
        "model_1": ["made"] * rows,
        "ranking_id": list(range(rows)),
        "user_id": [0] * rows,
        "num_example_per_prompt": [1] * rows,
    }
    pq.write_table(pa.table(table), root / "offline.parquet")
    (root / "recipe.yaml").write_text(RECIPE.format(model=model, root=root))
    return root


def weights(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every iterate's file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run_dir / "checkpoints").glob("weights-*.safetensors"))
    }


def distance(one: Weights, two: Weights, start: Weights) -> float:
    """How far apart two states of weights are, as a share of the way from `start` to the first.

    The measure for float32 runs that sum in another order. AdamW divides by the root of the second moment, so
    a weight whose gradient is nothing but rounding moves by a whole step in a direction that the order
    decides; no bound on a single weight holds on every processor, but all such weights together are nothing
    beside the movement.
    """
    difference, movement = (
        float(np.linalg.norm(np.concatenate([(other[name] - one[name]).ravel() for name in one])))
        for other in (two, start)
    )
    assert movement > 0
    return difference / movement


def base_weights(model: Path, part: str = "unet") -> Weights:
    """The denoiser of a pipeline's folder."""
    return load_file(model / part / "diffusion_pytorch_model.safetensors")


def pair_rows(run_dir: Path) -> list[dict[str, object]]:
    rows = []
    for path in sorted((run_dir / "store").rglob("pairs-*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return sorted(rows, key=lambda row: row["pair_id"])


@pytest.fixture(scope="session")
def truth(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("truth") / "run"
    diffexpo(*run_arguments(world, run_dir))
    return run_dir


def run_arguments(world: Path, run_dir: Path) -> list[str]:
    """`run` with the folder's name and place."""
    return ["run", str(world / "recipe.yaml"), "--out", str(run_dir)]


SIGKILL, SIGINT = signal.SIGKILL, signal.SIGINT
