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
    "training.steps=2",
    "training.checkpoint_every=10",
    "evaluation.every_iteration=false",
    "evaluation.num_prompts=1",
    "evaluation.kl_prompts=0",
    "evaluation.grid_prompts=1",
]
VARIANTS = {
    "one agent": ["explore.agents=1", "algorithm.alpha=0.0"],
    "rank sum": ["mixture.kind=rank"],
    "pareto": ["mixture.kind=pareto"],
    "append negatives": ["explore.negatives.mode=append"],
    "negatives for the explorer": [
        "explore.negatives.agents=exploration",
        "explore.negatives.schedule=constant",
    ],
    "no negatives": ["explore.negatives.schedule=off"],
    "cosine": ["explore.negatives.schedule=cosine"],
    "optimism": ["algorithm.uncertainty=optimism"],
    "pessimism": ["algorithm.uncertainty=pessimism"],
    "previous reference": ["algorithm.reference=previous"],
    "average reference of adapters": [
        "algorithm.reference=ema",
        "algorithm.anchor_weight=0.01",
        "tuning.kind=lora",
        "tuning.lora.rank=2",
    ],
    "held to the base": [
        "algorithm.alpha=0",
        "algorithm.reference=previous",
        "algorithm.anchor_weight=0.01",
        "algorithm.draws=2",
    ],
    "held to the guided base": ["algorithm.anchor_weight=0.01", "algorithm.anchor_guidance=3"],
    "literal beta": ["algorithm.beta_explore=literal"],
    "lora": ["tuning.kind=lora", "tuning.lora.rank=2"],
    "average": ["training.ema_decay=0.9"],
    "on-policy only": ["hybrid.offline_weight=0.0", "hybrid.decay=0.0"],
    "offline dpo beside it": ["baseline.offline_dpo=true", "explore.iterations=2"],
    "ddpm": ["explore.sampler.name=ddpm", "evaluation.sampler.name=dpmpp"],
}


def run(world, folder, settings):
    loaded = load_config([str(world / "recipe.yaml")], [*SMALL, *settings])
    assembly.run(loaded.config, folder, sources=loaded.sources, resume=False, console=Console())
    return loaded.config


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_variant_runs_whole(world, tmp_path, settings):
    folder = tmp_path / "run"
    config = run(world, folder, settings)
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


def test_negative_prompts_reach_who_they_should(world, tmp_path):
    folder = tmp_path / "run"
    run(world, folder, ["explore.negatives.agents=exploration", "explore.negatives.initial=1.0"])
    by_agent = {"main": [], "exploration": []}
    for row in Store(folder / "store").samples(1):
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
    for name, tuning in (("full", []), ("lora", ["tuning.kind=lora", "tuning.lora.rank=2"])):
        run(world, tmp_path / name, [*flow, *tuning])
        assert len(Store(tmp_path / name / "store").pairs(1)) > 0


def test_alpha_zero_is_diffusion_dpo_bit_for_bit(world, tmp_path):
    settings = ["explore.iterations=2"]
    run(world, tmp_path / "expo", [*settings, "algorithm.alpha=0.0"])
    run(world, tmp_path / "dpo", [*settings, "algorithm.type=diffusion_dpo"])
    for t in (1, 2):
        name = f"checkpoints/weights-{t:04d}.safetensors"
        assert (tmp_path / "expo" / name).read_bytes() == (tmp_path / "dpo" / name).read_bytes()
