"""Any picture can be drawn again from its row, bit for bit, and a pair knows its whole history."""

import json

import numpy as np

from diffexpo.data.store import Store
from tests.invariants.conftest import diffexpo


def test_a_sample_is_regenerated_bit_for_bit(truth, tmp_path):
    store = Store(truth / "store")
    rows = store.samples(2)
    chosen = [rows[0], rows[len(rows) // 2], rows[-1], next(row for row in rows if row.negative_prompt)]
    for row in chosen[:2]:
        done = diffexpo("data", "regenerate", truth, row.sample_id, tmp_path / "out.png")
        assert "identical" in done.out
    assert (tmp_path / "out.png").stat().st_size > 0


def test_inspect_prints_a_pairs_history(truth):
    pair = next(pair for pair in Store(truth / "store").pairs(2))
    done = diffexpo("data", "inspect", truth, pair.pair_id)
    for text in (pair.winner_id, pair.loser_id, "brightness", "seed"):
        assert str(text) in done.out


def test_verify_finds_a_changed_byte(truth, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(truth, copy)
    assert diffexpo("data", "verify", copy).code == 0
    shard = next((copy / "store").rglob("latents-0001-*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    done = diffexpo("data", "verify", copy, check=False)
    assert done.code == 4 and shard.name in done.out + done.err


def test_latents_in_the_store_are_what_pairs_train_on(truth):
    store = Store(truth / "store")
    pair = store.pairs(1)[0]
    latent = store.latent(pair.winner_id)
    assert latent.dtype == np.float32 and np.isfinite(latent).all()
    assert json.loads(store.sample(pair.winner_id).seed_key)[0] == 7
