"""How fast, in how much memory and how safely a large preference set is imported.

    .venv/bin/python benchmarks/import_speed.py
    .venv/bin/python benchmarks/import_speed.py --check decode --kills 3 --out
    benchmarks/results/import_decode.json .venv/bin/python benchmarks/import_speed.py --side 64 --out
    benchmarks/results/import_small.json

Makes a Pick-a-Pic-shaped set (512-pixel JPEGs, or of another --side, Parquet shards of 10,000 rows) and runs
`diffexpo data import` on it: wall and processor time, pairs and bytes a second, peak memory. Beside it stand
two floors, each in a process of its own like the import:

    disk     reads the set with pyarrow and writes the bytes of the result, file by file, with fsync
    decode   that, and every JPEG is decoded once at an eighth of its size: what no importer that decodes
    pictures can leave out

Then it imports the set again, killed with SIGKILL at random moments and started anew each time, and compares
every file of the two results: no pair may be lost or come twice. The result is written to
benchmarks/results/import_speed.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHARD_ROWS = 10_000
POOL = 4096


def jpegs(count: int, side: int, draw: random.Random) -> list[bytes]:
    """Different JPEGs: coarse noise scaled up, so that their size is that of pictures and not of noise."""
    found = []
    for _ in range(count):
        image = Image.frombytes("RGB", (8, 8), draw.randbytes(192)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def make_set(folder: Path, pairs: int, side: int, seed: int) -> None:
    """Write the set; one row in fifty is a tie, one in a hundred cannot be decoded."""
    draw = random.Random(seed)
    pool = jpegs(min(POOL, 2 * pairs), side, draw)
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, pairs, SHARD_ROWS)):
        rows = [row(number, pool, draw) for number in range(start, min(start + SHARD_ROWS, pairs))]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05d}.parquet", row_group_size=1000)


def row(number: int, pool: list[bytes], draw: random.Random) -> dict[str, object]:
    first, second = draw.sample(range(len(pool)), 2)
    label = 0.5 if number % 50 == 7 else float(draw.random() < 0.5)
    uids = [f"{number}-{first}", f"{number}-{second}"]
    return {
        "are_different": True, "best_image_uid": uids[0] if label == 1.0 else uids[1] if label == 0.0 else "tie",
        "caption": f"prompt {number // 10} of a synthetic set, with some more words", "has_label": True,
        "image_0_uid": uids[0], "image_1_uid": uids[1],
        "jpg_0": pool[first][:200] if number % 100 == 13 else pool[first], "jpg_1": pool[second],
        "label_0": label, "label_1": 1.0 - label, "model_0": "one", "model_1": "two", "ranking_id": number, "user_id": number % 97,
    }  # fmt: skip


def make_set_apart(folder: Path, pairs: int, side: int, seed: int) -> int:
    """`make_set` in a process of its own: the peak of a process counts what its parent held when it was
    started."""
    wanted = ["--make", str(folder), "--pairs", str(pairs), "--side", str(side), "--seed", str(seed)]
    subprocess.run([sys.executable, __file__, *wanted], check=True)
    return sum(path.stat().st_size for path in folder.iterdir())


def start(source: Path, target: Path, log: Path, check: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "diffexpo",
        "data",
        "import",
        str(source),
        "--to",
        str(target),
        "--check",
        check,
    ]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})


def start_floor(
    source: Path, result: Path, target: Path, log: Path, *, decode: bool
) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--floor", str(source), str(result), str(target)]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*command, "--decode"] if decode else command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )  # fmt: skip


def floor(source: Path, result: Path, target: Path, *, decode: bool) -> None:
    """Read a set, decode its pictures if asked to, and write as many bytes as its import has."""
    for file in sorted(source.glob("*.parquet")):
        # the fastest of the ways to read it that were tried
        parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        for batch in parquet.iter_batches(batch_size=256, use_threads=False):
            for name in ("jpg_0", "jpg_1") if decode else ():
                for data in batch.column(name).to_numpy(zero_copy_only=False):
                    decode_small(data)
    target.mkdir()
    for file in result.iterdir():
        with open(target / file.name, "wb") as out, open(file, "rb") as given:
            while part := given.read(2**20):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())


def decode_small(data: bytes) -> None:
    try:
        image = Image.open(io.BytesIO(data))
        image.draft(None, (image.width // 8, image.height // 8))
        image.load()
    except OSError:
        return  # one in a hundred is cut


def finish(process: subprocess.Popen[bytes], log: Path) -> tuple[float, float]:
    """(processor seconds, peak memory in MiB) of a process that must end well."""
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(log.read_text()[-2000:])
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def killed_import(
    source: Path,
    target: Path,
    log: Path,
    check: str,
    kills: int,
    shards: int,
    shard_s: float,
    draw: random.Random,
) -> list[int]:
    """Import with SIGKILL, each at a random moment behind another shard; returns the whole shards at each
    kill."""
    landed = []
    for kill in range(kills):
        process = start(source, target, log, check)
        wanted = round(kill * shards / kills)
        while process.poll() is None and whole_shards(target) < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, shard_s))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            landed.append(whole_shards(target))
        process.wait()
    finish(start(source, target, log, check), log)
    return landed


def whole_shards(target: Path) -> int:
    return len(list(target.glob("pairs-*.parquet")))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pair_ids(folder: Path) -> list[str]:
    """The names of all pairs of an import, in order."""
    return [
        name
        for path in sorted(folder.glob("*.parquet"))
        for name in pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist()
    ]


def measure(pairs: int, kills: int, side: int, seed: int, check: str, root: Path) -> dict[str, object]:
    """Everything the benchmark reports."""
    size = make_set_apart(root / "set", pairs, side, seed)
    log = root / "log.txt"
    began = time.perf_counter()
    cpu_s, peak = finish(start(root / "set", root / "whole", log, check), log)
    wall_s = time.perf_counter() - began
    floors = {}
    for name in ("disk", "decode"):
        began = time.perf_counter()
        process = start_floor(root / "set", root / "whole", root / name, log, decode=name == "decode")
        floor_cpu_s, _ = finish(process, log)
        floor_s = time.perf_counter() - began
        floors[name] = {
            "wall_s": floor_s,
            "cpu_s": floor_cpu_s,
            "import_over_it_wall": wall_s / floor_s,
            "import_over_it_cpu": cpu_s / floor_cpu_s,
        }
    report = json.loads((root / "whole" / "manifest.json").read_text())["report"]
    shards = whole_shards(root / "whole")
    landed = killed_import(
        root / "set", root / "killed", log, check, kills, shards, wall_s / (shards + 1), random.Random(seed)
    )
    names = pair_ids(root / "killed")
    return {
        "pairs": pairs,
        "side": side,
        "check": check,
        "set_mb": size / 1e6,
        "floors": floors,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "pairs_per_s": pairs / wall_s,
        "pairs_per_cpu_s": pairs / cpu_s,
        "mb_per_s": size / 1e6 / wall_s,
        "peak_mib": peak,
        "report": report,
        "kills_landed": len(landed),
        "whole_shards_at_kill": landed,
        "killed_equals_whole": contents(root / "killed") == contents(root / "whole"),
        "pairs_twice": len(names) - len(set(names)),
        "pairs_lost": report["kept"] - len(set(names)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="side of the JPEGs in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", choices=["decode", "structure"], default="structure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "import_speed.json")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--floor", type=Path, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_set(options.make, options.pairs, options.side, options.seed)
        return
    if options.floor:
        floor(*options.floor, decode=options.decode)
        return
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(
            options.pairs, options.kills, options.side, options.seed, options.check, Path(temporary)
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    same = "the same bytes" if result["killed_equals_whole"] else "DIFFERENT BYTES"
    print(
        f"{options.pairs:,} pairs, {result['set_mb']:.0f} MB: {result['wall_s']:.1f} s "
        f"({result['cpu_s']:.1f} s processor), "
        f"{result['pairs_per_s']:.0f} pairs/s, {result['mb_per_s']:.1f} MB/s; peak {result['peak_mib']:.0f} "
        f"MiB"
    )
    for name, cost in result["floors"].items():
        print(
            f"{name}: {cost['wall_s']:.1f} s ({cost['cpu_s']:.1f} s processor); the import takes "
            f"{cost['import_over_it_wall']:.2f} "
            f"times that ({cost['import_over_it_cpu']:.2f} in processor time)"
        )
    print(
        f"{result['kills_landed']} kills: {same}, {result['pairs_twice']} pairs twice, "
        f"{result['pairs_lost']} lost"
    )
    ok = result["killed_equals_whole"] and not result["pairs_twice"] and not result["pairs_lost"]
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
