"""Every variant of the outer loop runs whole on the tiny world and leaves what it must."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexpo import assembly
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.data.store import Store
from tests.tiny import tiny_flow

SMALL = [
    "explore.iterations=2",
    "training.steps=2",
    "training.checkpoint_every=10",
    "evaluation.every_iteration=false",
    "evaluation.num_prompts=1",
    "evaluation.kl_prompts=0",
    "evaluation.grid_prompts=1",
]
# A run takes several variants where each acts in a place of its own: how scores are mixed, how negative prompts are chosen, what
# the loss is, what is trained.
VARIANTS = {
    "one agent": ["explore.agents=1", "algorithm.alpha=0.0"],
    "rank sum, appended negatives, optimism": [
        "mixture.kind=rank",
        "explore.negatives.mode=append",
        "algorithm.uncertainty=optimism",
    ],
    "pareto, cosine, pessimism": [
        "mixture.kind=pareto",
        "explore.negatives.schedule=cosine",
        "explore.iterations=3",
        "algorithm.uncertainty=pessimism",
    ],
    "negatives for the explorer, previous reference": [
        "explore.negatives.agents=exploration",
        "explore.negatives.schedule=constant",
        "explore.iterations=3",
        "explore.negatives.initial=1.0",
        "algorithm.reference=previous",
    ],
    "no negatives, literal beta, average": [
        "explore.negatives.schedule=off",
        "algorithm.beta_explore=literal",
        "training.ema_decay=0.9",
    ],
    "average reference of adapters": [
        "algorithm.reference=ema",
        "algorithm.anchor_weight=0.01",
        "tuning.kind=lora",
        "tuning.lora.rank=2",
        "explore.iterations=3",
    ],
    "held to the base": [
        "algorithm.alpha=0",
        "algorithm.reference=previous",
        "algorithm.anchor_weight=0.01",
        "algorithm.draws=2",
    ],
    "held to the guided base": ["algorithm.anchor_weight=0.01", "algorithm.anchor_guidance=3"],
    "lora": ["tuning.kind=lora", "tuning.lora.rank=2"],
    "on-policy only": ["hybrid.offline_weight=0.0", "hybrid.decay=0.0"],
    "offline dpo beside it": ["baseline.offline_dpo=true"],
    "ddpm": ["explore.sampler.name=ddpm", "evaluation.sampler.name=dpmpp"],
}


def run(world, folder, settings, stop_after=None):
    loaded = load_config([str(world / "recipe.yaml")], [*SMALL, *settings])
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=False,
        console=Console(),
        stop_after=stop_after,
    )
    return loaded.config


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_whole(world, tmp_path, name):
    folder = tmp_path / "run"
    config = run(world, folder, VARIANTS[name])
    store = Store(folder / "store")
    last = config.explore.iterations
    assert {(name, t) for name, t in store.completed()} >= {
        ("train", last),
        ("collect", last - 1),
        ("pair", last - 1),
    }
    rows = store.samples(1)
    images = 2 * config.explore.images_per_prompt
    assert len(rows) == config.explore.prompts_per_iteration * images
    assert {row.agent for row in rows} == (
        {"exploration"} if config.explore.agents == 1 else {"main", "exploration"}
    )
    one, two = (load_file(folder / "checkpoints" / f"weights-{t:04d}.safetensors") for t in (1, last))
    assert any(np.abs(one[name] - two[name]).max() > 0 for name in one)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "report.html").stat().st_size > 10_000
    if "negatives for the explorer" in name:
        by_agent = {"main": [], "exploration": []}
        for row in rows:
            by_agent[row.agent].append(bool(row.negative_prompt))
        assert all(by_agent["exploration"]) and not any(by_agent["main"])


def test_flow_models_run_the_same_loop(world, tmp_path):
    model = tiny_flow(tmp_path / "flow")
    flow = [
        f"model.path={model}",
        "explore.sampler.name=flow_euler",
        "evaluation.sampler.name=flow_euler",
        "evaluation.kl_prompts=1",
    ]
    # The export of trained adapters and the report belong to the run, those of all weights to the contract of SD3.
    lora = ["tuning.kind=lora", "tuning.lora.rank=2"]
    for name, tuning, last in (("full", [], "train-2"), ("lora", lora, None)):
        run(world, tmp_path / name, [*flow, *tuning], stop_after=last)
        assert len(Store(tmp_path / name / "store").pairs(1)) > 0


def test_alpha_zero_is_diffusion_dpo_bit_for_bit(world, tmp_path):
    run(world, tmp_path / "expo", ["algorithm.alpha=0.0"], stop_after="train-2")
    run(world, tmp_path / "dpo", ["algorithm.type=diffusion_dpo"], stop_after="train-2")
    for t in (1, 2):
        name = f"checkpoints/weights-{t:04d}.safetensors"
        assert (tmp_path / "expo" / name).read_bytes() == (tmp_path / "dpo" / name).read_bytes()
