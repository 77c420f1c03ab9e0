"""The two run folders beside this file, made once by the code of commit e056383:

    PYTHONPATH=<tree of e056383>/src python -m tests.invariants.old_run.make <empty folder>

`whole` ran to its end, `begun` was killed in the training of iteration 2, after a checkpoint. What a run
makes again is left out (report, export, log). `world` builds the base model, the rewards
and the rest, the same on every machine: the weights come from NumPy's uniform generator, which rounds
nowhere, so that the base's fingerprint is the one that the run folders hold.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import MAX_TOKENS, tiny_tokenizer
from tests.world import REWARDS

RECIPE = """\
name: old
seed: 3
model: {path: model, device: cpu}
prompts: {source: prompts.txt}
offline: {source: offline.parquet}
explore:
  iterations: 2
  prompts_per_iteration: 3
  images_per_prompt: 2
  batch_size: 4
  sampler: {name: ddim, steps: 2, guidance: 2.0, eta: 1.0}
  negatives: {source: negatives.txt, schedule: linear, initial: 0.9}
rewards:
  - {name: brightness, type: python, path: "rewards.py:brightness"}
algorithm: {type: expo, beta: 200.0, alpha: 0.1, contrast_fraction: 0.5}
training: {steps: 4, batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3, checkpoint_every: 1}
evaluation:
  prompts: heldout.txt
  num_prompts: 2
  sampler: {name: ddim, steps: 2, guidance: 2.0}
  judges: [{name: redness, type: python, path: "rewards.py:redness"}]
  kl_prompts: 0
  vendi_prompts: 0
  bootstrap: 100
  grid_prompts: 1
"""


def pipeline() -> StableDiffusionPipeline:
    """As small as its parts go: 8 channels, text of width 8, images of 16 x 16."""
    tokenizer, width = tiny_tokenizer(), 8
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def world(root: Path) -> Path:
    """Everything that the stored runs name, in an empty folder."""
    pipe, generator = pipeline(), np.random.default_rng(0)
    with torch.no_grad():
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            for parameter in part.parameters():
                uniform = torch.from_numpy(generator.random(tuple(parameter.shape), dtype=np.float32)) - 0.5
                # A power of two near 1 / sqrt(fan in): exact.
                scale = 2.0 ** -round(0.5 * np.log2(parameter[0].numel())) if parameter.dim() > 1 else 0.5
                parameter.copy_(scale * uniform if parameter.dim() > 1 else 1.0 + scale * uniform)
    pipe.save_pretrained(str(root / "model"))
    prompts = [f"thing {index}" for index in range(5)]
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (root / "heldout.txt").write_text("unseen 1\nunseen 2\n")
    (root / "negatives.txt").write_text("dark\nblurry\n")
    (root / "rewards.py").write_text(REWARDS)
    rows = 4
    table = {
        "caption": prompts[:rows],
        "jpg_0": [jpeg(50 * index) for index in range(rows)],
        "jpg_1": [jpeg(255 - 50 * index) for index in range(rows)],
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
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def jpeg(grey: int) -> bytes:
    with tempfile.TemporaryFile() as file:
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(file, "JPEG")
        file.seek(0)
        return file.read()


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = world(Path(temporary))
        settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}

        def start(name: str) -> subprocess.Popen[bytes]:
            # Relative paths, so that the folders may be copied anywhere beside a world.
            words = [sys.executable, "-m", "diffexpo", "run", "recipe.yaml", "--out", name]
            return subprocess.Popen(words, env=settings, cwd=root)

        assert start("whole").wait() == 0
        process, moment = start("begun"), "begun/checkpoints/iteration-0002/checkpoint-*"
        while process.poll() is None and not any(root.glob(moment)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        left_out = shutil.ignore_patterns("export", "*.html", "*.lock", "log.txt")
        for name in ("whole", "begun"):
            shutil.copytree(root / name, target / name, ignore=left_out)
            for file, changes in (("env.json", {"platform": "Linux"}), ("status.json", {"host": "old"})):
                path = target / name / file
                path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
