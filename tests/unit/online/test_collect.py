import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffexpo.config.schema import ExploreConfig, SamplerConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.errors import Interrupted, StoreError
from diffexpo.online.agents import make_agents
from diffexpo.online.explore import Request
from diffexpo.online.units import Drawing, collect, group_rows, make_units, redraw, texts_needed
from diffexpo.policies.toy import TOY_FULL, TOY_LORA, ToyPolicy
from diffexpo.types import Prompt
from tests.learning.toy import PATHS
from tests.rows import sample_row

GUIDED = {
    "vp": SamplerConfig(name="ddim", steps=4, guidance=3.0, eta=1.0),
    "flow": SamplerConfig(name="flow_euler", steps=4, guidance=3.0),
}
REQUESTS = [
    Request(Prompt("a", "a cat"), None),
    Request(Prompt("b", "a dog"), "blurry"),
    Request(Prompt("a", "a cat"), "dark night"),
    Request(Prompt("c", "a bird"), None),
    Request(Prompt("d", "a fish"), "blurry"),
]


def red(drawn, prompts):
    images = drawn.images
    return {"red": images[:, 0].mean(dim=(1, 2)).numpy(), "length": np.array([len(text) for text in prompts])}


def make_drawing(kind="vp", tuning=TOY_FULL, *, append=False, score=red, sampler=None):
    policy = ToyPolicy(PATHS[kind], tuning=tuning)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter += 0.05
    policy.weights.copy("base", "main")
    return Drawing(policy, PromptEmbeddings(policy), score, sampler or GUIDED[kind], append, 7, 2, "toy")


def explore(**changes):
    values = {"images_per_prompt": 3, "negatives": {"source": "list.txt"}} | changes
    return ExploreConfig.model_validate(values)


def units_of(drawing, batch_size=4, **changes):
    return make_units(make_agents(drawing.policy.weights, explore(**changes)), REQUESTS, batch_size)


def finish(drawing, units, root, size=1):
    store = Store(root)
    for rank in range(size):
        collect(drawing, units, store, rank=rank, size=size, tick=lambda: None)
    store.write_manifest("collect", drawing.iteration, {})
    return store


def test_agents_draw_as_many_candidates_in_both_variants():
    weights = make_drawing().policy.weights
    main, exploration = make_agents(weights, explore())
    (alone,) = make_agents(weights, explore(agents=1))
    assert (main.version, exploration.version, alone.version) == ("main", "current", "current")
    assert main.num_images + exploration.num_images == alone.num_images == 6
    assert exploration.fingerprint == alone.fingerprint == weights.fingerprint("current") != main.fingerprint


def test_the_base_draws_alone_and_as_many_where_a_card_says_so():
    weights = make_drawing().policy.weights
    (base,) = make_agents(weights, explore(agents=1), drawn_by="base")
    assert (base.name, base.version, base.num_images) == ("base", "base", 6)
    assert base.fingerprint == weights.fingerprint("base") != weights.fingerprint("current")


def test_who_gets_negative_prompts():
    weights = make_drawing().policy.weights

    def users(**negatives):
        agents = make_agents(weights, explore(negatives={"source": "list.txt"} | negatives))
        return [agent.name for agent in agents if agent.uses_negatives]

    assert users() == ["main", "exploration"]
    assert users(agents="exploration") == ["exploration"]
    assert users(schedule="off") == users(source=None) == []


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_units_hold_every_image_once_in_full_batches_of_one_agent(batch_size):
    units = units_of(make_drawing(), batch_size)
    assert [unit.number for unit in units] == list(range(len(units)))
    drawn = [(unit.agent.name, item.group, item.index) for unit in units for item in unit.items]
    wanted = [
        (name, group, index) for name in ("main", "exploration") for group in range(5) for index in range(3)
    ]
    assert drawn == wanted
    for name in ("main", "exploration"):
        sizes = [len(unit.items) for unit in units if unit.agent.name == name]
        assert all(size == batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= batch_size
    assert all(item.request is REQUESTS[item.group] for unit in units for item in unit.items)


@pytest.mark.parametrize("size", [2, 3, 20])
def test_processes_change_nothing_but_who_writes(size, tmp_path):
    drawing = make_drawing()
    one = finish(drawing, units_of(drawing), tmp_path / "one")
    many = finish(drawing, units_of(drawing), tmp_path / "many", size)

    def plain(row):
        return replace(row, latent_file="")

    assert [plain(row) for row in one.samples(2)] == [plain(row) for row in many.samples(2)]
    ids = [row.sample_id for row in one.samples(2)]
    assert len(ids) == len(set(ids)) == 30
    assert np.array_equal(one.latents(ids), many.latents(ids))


def test_a_stopped_collection_goes_on_where_it_was(tmp_path):
    drawing = make_drawing()
    units = units_of(drawing)
    whole = finish(drawing, units, tmp_path / "whole")
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 18:
            raise Interrupted("stopped")

    store = Store(tmp_path / "parts")
    with pytest.raises(Interrupted):
        collect(drawing, units, store, rank=0, size=1, tick=stop)
    assert [store.unit_done(2, unit.number) for unit in units] == [True] * 3 + [False] * 5
    store.discard_incomplete("collect", 2)
    calls.clear()
    collect(drawing, units, store, rank=0, size=1, tick=lambda: calls.append(None))
    # Finished units are ticked too: the progress bar ends at its total.
    assert len(calls) == len(units) * (drawing.sampler.steps + 1)
    store.write_manifest("collect", 2, {})
    assert store.samples(2) == whole.samples(2)
    ids = [row.sample_id for row in whole.samples(2)]
    assert np.array_equal(store.latents(ids), whole.latents(ids))


def test_rows_say_what_drew_and_scored_them(tmp_path):
    drawing = make_drawing()
    store = finish(drawing, units_of(drawing), tmp_path)
    rows = store.samples(2)
    row = next(row for row in rows if row.sample_id == "0002-000002-exploration-01")
    assert (row.prompt, row.negative_prompt, row.agent) == ("a cat", "dark night", "exploration")
    assert json.loads(row.seed_key) == [7, 2, "collect", "exploration", "a", 2, 1]
    assert json.loads(row.sampler) == drawing.sampler.model_dump() | {"append_negatives": False}
    assert row.weights == drawing.policy.weights.fingerprint("current")
    # Scorers see the plain prompt and the picture of the stored latents (a mean over pixels in float32).
    assert row.rewards["length"] == len("a cat")
    picture = drawing.policy.decode_latents(torch.from_numpy(store.latents([row.sample_id])))
    assert row.rewards["red"] == pytest.approx(float(picture[0, 0].mean()), abs=4e-6)


def test_every_image_has_noise_of_its_own(tmp_path):
    drawing = make_drawing()
    store = finish(drawing, units_of(drawing), tmp_path)
    rows = store.samples(2)
    assert len({row.seed_key for row in rows}) == len(rows)
    latents = store.latents([row.sample_id for row in rows]).reshape(len(rows), -1)
    distances = np.abs(latents[:, None] - latents[None]).max(axis=2) + np.eye(len(rows))
    assert distances.min() > 1e-4


def test_batch_size_changes_rounding_only(tmp_path):
    drawing = make_drawing()
    found = []
    for batch_size in (1, 7):
        store = finish(drawing, units_of(drawing, batch_size), tmp_path / str(batch_size))
        ids = sorted(row.sample_id for row in store.samples(2))
        found.append(store.latents(ids))
    assert np.abs(found[0] - found[1]).max() < 1e-4


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("tuning", [TOY_FULL, TOY_LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_a_sample_is_drawn_again_bit_for_bit(kind, tuning, append, tmp_path):
    drawing = make_drawing(kind, tuning, append=append)
    store = finish(drawing, units_of(drawing), tmp_path)
    embeddings = PromptEmbeddings(drawing.policy)
    rows = store.samples(2)
    assert {bool(row.negative_prompt) for row in rows} == {True, False}
    for row in rows:
        version = "main" if row.agent == "main" else "current"
        with drawing.policy.weights.use(version):
            latents = redraw(drawing.policy, embeddings, row, lambda: None)
        assert latents.shape == (1, 2, 1, 1)
        assert np.array_equal(latents[0].numpy(), store.latent(row.sample_id))


def test_negative_prompts_change_the_picture_in_both_modes(tmp_path):
    drawn = {}
    for name, append, source in (
        ("cfg", False, "list.txt"),
        ("append", True, "list.txt"),
        ("none", False, None),
    ):
        drawing = make_drawing(append=append)
        store = finish(drawing, units_of(drawing, negatives={"source": source}), tmp_path / name)
        drawn[name] = {row.sample_id: store.latent(row.sample_id) for row in store.samples(2)}
    for sample_id, plain in drawn["none"].items():
        has_negative = REQUESTS[int(sample_id.split("-")[1])].negative is not None
        for mode in ("cfg", "append"):
            assert np.array_equal(drawn[mode][sample_id], plain) != has_negative


def test_what_was_not_drawn_cannot_be_drawn_again():
    drawing = make_drawing()
    row = sample_row("offline-1")
    with pytest.raises(StoreError, match="offline-1.*imported, not drawn"):
        redraw(drawing.policy, drawing.embeddings, row, lambda: None)


def test_texts_needed():
    assert texts_needed(REQUESTS, False) == ["", "a cat", "a dog", "blurry", "dark night", "a bird", "a fish"]
    assert texts_needed(REQUESTS, True) == [
        "", "a cat", "a dog", "a dog, blurry", "a cat, dark night", "a bird", "a fish", "a fish, blurry",
    ]  # fmt: skip
    assert texts_needed([], False) == [""]


@pytest.mark.parametrize("append", [False, True])
def test_no_other_text_is_encoded_while_collecting(append, tmp_path):
    drawing = make_drawing(append=append)
    drawing.embeddings.add(texts_needed(REQUESTS, append))
    count = len(drawing.embeddings)
    finish(drawing, units_of(drawing), tmp_path)
    assert len(drawing.embeddings) == count


def test_group_rows_ignores_the_order_of_shards():
    rows = [sample_row(f"{group:03d}-{name}", group=group) for group in (10, 2, 0) for name in "cab"]
    expected = [[f"{group:03d}-{name}" for name in "abc"] for group in (0, 2, 10)]
    for order in (rows, rows[::-1], rows[1::2] + rows[::2]):
        assert [[row.sample_id for row in group] for group in group_rows(order)] == expected
    assert group_rows([]) == []
