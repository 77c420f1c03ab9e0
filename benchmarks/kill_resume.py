"""kill -9 at random moments of a short run; every resume must end with bit-identical weights.

    .venv/bin/python benchmarks/kill_resume.py --kills 25

One uninterrupted run gives the truth: the SHA-256 of the final weights file, of every iterate and of the
table of pairs. Then each trial starts the same run in a new folder, kills the whole process group with
SIGKILL at a random moment (uniform over the uninterrupted run's wall time, start-up included), resumes with
`diffexpo run --resume` (killed again with --kills-per-trial 2 and more), and compares. A run that ends before
its moment is compared too, but counts as no kill: trials go on until so many have landed. The series is
written to benchmarks/results/kill_resume.json; with --append it is added to those that are there.
"""

from __future__ import annotations

import argparse
import hashlib
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

import pyarrow.parquet as pq


def command(run_dir: Path, recipe: str, resume: bool) -> list[str]:
    base = [sys.executable, "-m", "diffexpo", "run"]
    return [*base, "--resume", str(run_dir)] if resume else [*base, recipe, "--out", str(run_dir)]


def start(arguments: list[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(arguments, stdout=out, stderr=out, env=environment, start_new_session=True)


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every iterate and of the pair table's contents."""
    result = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run_dir / "checkpoints").glob("weights-*.safetensors"))
    }
    pairs = []
    for path in sorted((run_dir / "store").rglob("pairs-*.parquet")):
        pairs += pq.read_table(path).to_pylist()
    result["pairs"] = hashlib.sha256(json.dumps(pairs, sort_keys=True, default=str).encode()).hexdigest()
    return result


def trial(folder: Path, recipe: str, moments: list[float], threads: int) -> dict[str, object]:
    """One run that is killed after each of `moments` seconds and then resumed to its end."""
    run_dir, log = folder / "run", folder / "log.txt"
    landed = []
    for moment in moments:
        process = start(command(run_dir, recipe, resume=(run_dir / "config.yaml").exists()), log, threads)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            landed.append(where(run_dir))
    process = start(command(run_dir, recipe, resume=(run_dir / "config.yaml").exists()), log, threads)
    code = process.wait()
    return {"landed": landed, "exit": code, "fingerprint": fingerprint(run_dir) if code == 0 else None}


def where(run_dir: Path) -> str:
    """How far the run had come when it was killed: the manifests that existed."""
    done = sorted(path.stem for path in (run_dir / "store" / "manifests").glob("*.json"))
    return f"{len(done)} stages done" + (f", last {done[-1]}" if done else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="number of kills that land")
    parser.add_argument("--kills-per-trial", type=int, default=1, help="kills before a run may end")
    parser.add_argument("--recipe", default="emoji/quick")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill moments")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.json")
    parser.add_argument("--append", action="store_true", help="keep the series that --out holds")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "truth").mkdir()
        began = time.perf_counter()
        truth = trial(root / "truth", options.recipe, [], options.threads)
        seconds = time.perf_counter() - began
        if truth["exit"] != 0:
            sys.exit((root / "truth" / "log.txt").read_text()[-2000:])
        print(f"uninterrupted run: {seconds:.1f} s")
        same, kills, rows = 0, 0, []
        while kills < options.kills:
            index = len(rows)
            folder = root / f"trial-{index}"
            folder.mkdir()
            moments = [draw.uniform(0.5, seconds) for _ in range(options.kills_per_trial)]
            outcome = trial(folder, options.recipe, moments, options.threads)
            identical = outcome["fingerprint"] == truth["fingerprint"]
            same += identical
            kills += len(outcome["landed"])
            rows.append(
                {
                    "moments_s": moments,
                    "landed": outcome["landed"],
                    "exit": outcome["exit"],
                    "identical": identical,
                }
            )
            print(
                f"{index + 1}: killed at {moments} ({outcome['landed']}): "
                f"{'identical' if identical else 'DIFFERENT'}",
                flush=True,
            )
            if not identical:
                print((folder / "log.txt").read_text()[-2000:])
    result = {
        "seed": options.seed,
        "kills_landed": kills,
        "trials": len(rows),
        "identical": same,
        "uninterrupted_s": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(options.out.read_text()) if options.append and options.out.exists() else []
    options.out.write_text(json.dumps([*earlier, result], indent=1) + "\n")
    print(f"{same} of {len(rows)} runs ended bit-identical after {kills} kills")
    sys.exit(0 if same == len(rows) else 1)


if __name__ == "__main__":
    main()
