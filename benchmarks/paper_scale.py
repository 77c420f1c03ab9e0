"""What a store costs at the size of the EXPO paper and beyond: a unit, an index, a batch, an export.

    python benchmarks/paper_scale.py                     # 200,000 units, 1,600,000 samples, 1,000,000 pairs
    python benchmarks/paper_scale.py --units 20000 --pairs 100000

Complete iterations are written as the packs that their units become; one iteration more is left open and gets
its units one by one, as a run does. Latents are small (the cost of an address does not depend on them); the
batch of 64 is of latents of Stable Diffusion 1.5's size too. CPU time of one thread, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffexpo.data.latent_files import write_pack
from diffexpo.data.manifests import write_manifest
from diffexpo.data.rows import SCHEMAS, Sample
from diffexpo.data.shards import ROWS_AT_ONCE, Shard, write_tables
from diffexpo.data.store import Store
from diffexpo.files import sha256_of

ITERATIONS, IMAGES, OPEN_UNITS, PACK_ROWS = 5, 8, 512, 1 << 16
SAMPLER = json.dumps({"name": "ddim", "steps": 50, "guidance": 7.5, "eta": 0.0, "append_negatives": False})
TARGETS = {
    "append of a unit, ms CPU": 15.0,
    "index of the pairs, s CPU": 2.0,
    "index of the pairs, MB": 200.0,
    "64 random latents, ms CPU": 1.0,
    "64 random latents of 4x64x64, ms CPU": 1.0,
    "export of the pairs, MB at its peak": 500.0,
}


def sample_ids(iteration: int, first: int, count: int) -> list[str]:
    """Names of samples: the first half of each iteration's images are those of exploration."""
    return [
        f"{iteration:04d}-{k // IMAGES:06d}-{'exploration' if k % IMAGES < IMAGES // 2 else 'main'}-{k % IMAGES:02d}"
        for k in range(first, first + count)
    ]


def write_samples(root: Path, iteration: int, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The packs of an iteration's samples; returns its manifest's entries."""
    files: dict[str, Any] = {}
    data = np.zeros(shape, np.float32).tobytes()
    for number, first in enumerate(range(0, count, PACK_ROWS)):
        ids = sample_ids(iteration, first, min(PACK_ROWS, count - first))
        rows = Shard("samples", "collect", iteration, None, number)
        latents = rows.sibling("latents")
        read = partial(same_latents, len(ids), data)
        digest = write_pack(root / latents.name, ids, [("F32", shape)] * len(ids), read)
        tables = (
            samples_table(ids[start : start + ROWS_AT_ONCE], iteration, first + start, latents.name)
            for start in range(0, len(ids), ROWS_AT_ONCE)
        )
        write_tables(root / rows.name, tables, SCHEMAS["samples"], digest)
        for name in (latents.name, rows.name):
            path = root / name
            files[name] = {"sha256": sha256_of(path), "rows": len(ids), "bytes": path.stat().st_size}
    return files


def same_latents(count: int, data: bytes) -> Iterator[tuple[int, memoryview]]:
    return ((row, memoryview(data)) for row in range(count))


def samples_table(ids: list[str], iteration: int, first: int, latent_file: str) -> pa.Table:
    places = np.arange(first, first + len(ids))
    groups, count = places // IMAGES, len(ids)
    prompts = [f"a photograph of subject number {group:06d} in front of a wall" for group in groups]
    values: dict[str, Any] = {
        "sample_id": ids,
        "iteration": [iteration] * count,
        "unit": places // IMAGES,
        "group": groups,
        "prompt_id": [f"{group:016x}" for group in groups],
        "prompt": prompts,
        "agent": [name.split("-")[2] for name in ids],
        "weights": [f"{iteration:064x}"] * count,
        "seed_key": [f'[0, {iteration}, "collect", {place}]' for place in places],
        "batch_size": [IMAGES] * count,
        "batch_position": places % IMAGES,
        "sampler": [SAMPLER] * count,
        "rewards": [{"judge": float(place % 97)} for place in places],
        "latent_file": [latent_file] * count,
        "model": ["model"] * count,
        "source": ["online"] * count,
        "height": [512] * count,
        "width": [512] * count,
    }
    return whole_table("samples", values, count)


def write_pairs(root: Path, iteration: int, count: int, groups: int) -> dict[str, Any]:
    """The pairs of an iteration as one shard; returns its manifest's entry."""
    shard = Shard("pairs", "pair", iteration, 0, 0)

    def tables() -> Iterator[pa.Table]:
        for first in range(0, count, ROWS_AT_ONCE):
            places = np.arange(first, min(first + ROWS_AT_ONCE, count))
            group = places % groups
            explored = [
                f"{iteration:04d}-{k:06d}-exploration-{place % 4:02d}" for place, k in zip(places, group)
            ]
            main = [f"{iteration:04d}-{k:06d}-main-{4 + place % 4:02d}" for place, k in zip(places, group)]
            values: dict[str, Any] = {
                "pair_id": [f"pair-{iteration:04d}-{place:06d}" for place in places],
                "iteration": [iteration] * len(places),
                "prompt_id": [f"{k:016x}" for k in group],
                "prompt": [f"a photograph of subject number {k:06d} in front of a wall" for k in group],
                "winner_id": explored,
                "loser_id": main,
                "judge": ["judge"] * len(places),
                "margin": places % 97 / 10,
                "source": ["online"] * len(places),
                "winner_agent": ["exploration"] * len(places),
                "loser_agent": ["main"] * len(places),
                "explored_id": explored,
                "main_id": main,
            }
            yield whole_table("pairs", values, len(places))

    write_tables(root / shard.name, tables(), SCHEMAS["pairs"], "")
    path = root / shard.name
    return {shard.name: {"sha256": sha256_of(path), "rows": count, "bytes": path.stat().st_size}}


def whole_table(kind: str, values: dict[str, Any], count: int) -> pa.Table:
    schema = SCHEMAS[kind]
    empty = {field.name: [None] * count for field in schema if field.name not in values}
    columns = values | empty
    return pa.table(
        {field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema
    )


def build(root: Path, units: int, pairs: int, shape: tuple[int, ...]) -> None:
    """A store of complete iterations with units of `IMAGES` samples."""
    (root / "manifests").mkdir(parents=True)
    each = units // ITERATIONS
    for iteration in range(1, ITERATIONS + 1):
        files = write_samples(root, iteration, each * IMAGES, shape)
        write_manifest(root, "collect", iteration, {}, files)
        files = write_pairs(root, iteration, pairs // ITERATIONS, each)
        write_manifest(root, "pair", iteration, {}, files)


def measure_append(root: Path) -> dict[str, float]:
    """CPU time of the last units of an iteration that is being collected."""
    store, iteration = Store(root), ITERATIONS + 1
    latents = np.zeros((IMAGES, 4, 16, 16), np.float32)
    spent = []
    for unit in range(OPEN_UNITS):
        began = time.process_time()
        rows = [
            Sample(
                sample_id=name, group=unit, prompt_id=f"{unit:016x}", prompt=f"a photograph of {unit}",
                agent="main", weights="0" * 64, seed_key=f'[0, {iteration}, "collect", {unit}]', batch_size=IMAGES,
                batch_position=place, sampler=SAMPLER, rewards={"judge": 0.5}, model="model", source="online",
                height=512, width=512,
            )
            for place, name in enumerate(sample_ids(iteration, unit * IMAGES, IMAGES))
        ]  # fmt: skip
        store.append_unit(iteration, 0, unit, rows, latents)
        spent.append(time.process_time() - began)
    return {"append of a unit, ms CPU": float(np.median(spent[-200:])) * 1e3}


def measure_index(root: Path) -> dict[str, float]:
    """Index and loader of all pairs: CPU time, and memory above that of the imported program."""
    from diffexpo.config.schema import HybridConfig
    from diffexpo.data.pairs import PairLoader, pair_index

    store, before = Store(root, create=False), memory("VmRSS")
    pa.set_cpu_count(1)
    began = time.process_time()
    index = pair_index(store, HybridConfig(), ITERATIONS + 1)
    embeddings: Any = None
    loader = PairLoader(store, index, embeddings, batch_size=64, run_seed=0, iteration=ITERATIONS + 1)
    spent = time.process_time() - began
    drawn = loader.draws.batch(0)
    assert len(drawn) == 64 and drawn[0].ref.winner_id.startswith("000")
    return {"index of the pairs, s CPU": spent, "index of the pairs, MB": memory("VmRSS") - before}


def measure_latents(root: Path) -> dict[str, float]:
    """CPU time of 64 samples anywhere in the store, the median of many draws."""
    return {"64 random latents, ms CPU": random_reads(Store(root, create=False))}


def measure_large(root: Path) -> dict[str, float]:
    """The same of latents of Stable Diffusion 1.5's size, 8,192 of them."""
    folder = root / "large"
    (folder / "manifests").mkdir(parents=True)
    write_manifest(folder, "collect", 1, {}, write_samples(folder, 1, 8192, (4, 64, 64)))
    return {"64 random latents of 4x64x64, ms CPU": random_reads(Store(folder))}


def random_reads(store: Store) -> float:
    generator, spent = np.random.default_rng(0), []
    known = store.table("samples", ["sample_id"])["sample_id"].to_pylist()
    for _ in range(300):
        ids = [known[k] for k in generator.integers(0, len(known), 64)]
        began = time.process_time()
        store.latents(ids)
        spent.append(time.process_time() - began)
    return float(np.median(spent[50:])) * 1e3


def measure_export(root: Path) -> dict[str, float]:
    """All pairs with their images: memory at its peak, of the whole process."""
    from diffexpo.data.export import export_pairs

    store = Store(root, create=False)
    pa.set_cpu_count(1)
    tile = np.zeros((4, 4, 3), np.uint8)
    began = time.process_time()
    count = export_pairs(store, root / "out.parquet", lambda latents: np.stack([tile] * len(latents)))
    spent = time.process_time() - began
    (root / "out.parquet").unlink()
    return {
        "export of the pairs, MB at its peak": memory("VmHWM"),
        "export of the pairs, ms CPU a row": spent / count * 1e3,
    }


def memory(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


STEPS = {
    "append": measure_append,
    "index": measure_index,
    "latents": measure_latents,
    "large": measure_large,
    "export": measure_export,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to build it; default: a temporary one"
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="what to measure")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder)))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder)) / "store"
    try:
        began = time.process_time()
        build(folder, options.units, options.pairs, (4, 4, 4))
        print(
            f"{options.units:,} units, {options.units * IMAGES:,} samples, {options.pairs:,} pairs, built in "
            f"{time.process_time() - began:.0f} s CPU; {sum(1 for _ in folder.iterdir())} files",
            flush=True,
        )
        for step in options.only:
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for name, value in found.items():
                target = TARGETS.get(name)
                verdict = "" if target is None else f"   <= {target:g}: {'yes' if value <= target else 'NO'}"
                print(f"{name:40} {value:10.2f}{verdict}", flush=True)
    finally:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
