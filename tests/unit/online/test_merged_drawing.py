"""Pictures drawn with merged adapters: their rows say so, and they are drawn again bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffexpo.config.schema import LoraConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.online.agents import make_agents
from diffexpo.online.units import Drawing, collect, make_units, redraw, was_merged
from diffexpo.policies.toy import ToyPolicy
from diffexpo.policies.weights import fingerprint_state
from tests.learning.toy import PATHS
from tests.rows import sample_row
from tests.unit.online.test_collect import GUIDED, REQUESTS, explore, red

# A scale that is no power of two, so that merging rounds.
TUNING = TuningConfig(kind="lora", lora=LoraConfig(rank=3, alpha=1.7, target_modules=("first", "second")))


def drawing_of(kind: str) -> Drawing:
    policy = ToyPolicy(PATHS[kind], tuning=TUNING)
    for version, seed in (("main", 1), ("current", 2)):
        generator = torch.Generator().manual_seed(seed)
        state = policy.weights.state("base")
        drawn = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        policy.weights.load(version, drawn)
    return Drawing(policy, PromptEmbeddings(policy), red, GUIDED[kind], False, 7, 2, "toy", merged=True)


def collected(drawing: Drawing, root: Path) -> Store:
    store = Store(root)
    units = make_units(make_agents(drawing.policy.weights, explore()), REQUESTS, 4)
    collect(drawing, units, store, rank=0, size=1, tick=lambda: None)
    store.write_manifest("collect", drawing.iteration, {})
    return store


def test_merged_pictures_are_drawn_again_bit_for_bit(tmp_path: Path) -> None:
    for kind in ("vp", "flow"):
        drawing = drawing_of(kind)
        network = drawing.policy.weights.network
        before = fingerprint_state(network.state_dict())
        store = collected(drawing, tmp_path / kind)
        assert fingerprint_state(network.state_dict()) == before
        differing = 0
        for row in store.samples(2):
            assert was_merged(row) and json.loads(row.sampler)["merged"] is True
            version = "main" if row.agent == "main" else "current"
            found = {}
            for merged in (True, False):
                with drawing.policy.weights.use(version, merged=merged):
                    found[merged] = redraw(drawing.policy, drawing.embeddings, row, lambda: None)[0].numpy()
            assert np.array_equal(found[True], store.latent(row.sample_id))
            assert np.abs(found[True] - found[False]).max() < 1e-4
            differing += not np.array_equal(found[True], found[False])
        assert differing > 0, "merging rounds like adapters: the test shows nothing"


def test_rows_of_other_pictures_say_nothing_of_it(tmp_path: Path) -> None:
    store = collected(replace(drawing_of("vp"), merged=False), tmp_path)
    assert not any(was_merged(row) or "merged" in row.sampler for row in store.samples(2))
    assert not was_merged(sample_row("imported"))
