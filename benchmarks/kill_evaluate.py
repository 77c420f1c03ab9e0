"""kill -9 at random moments of an evaluation; the same command must end with the table of one that was not killed.

    .venv/bin/python benchmarks/kill_evaluate.py --kills 10

One uninterrupted `diffexpo evaluate` of the base of the scenes at two guidance scales gives the truth: table.csv, every
image and every score. Then the same command starts in new folders and its process group gets SIGKILL at a
random moment: when a number of files is there that is uniform over those of the whole evaluation, and then up to a
second later, so that load of the machine does not move all moments to the start-up. It starts again, is killed again,
and so on `--kills-per-trial` times before it may end. Everything is compared. The result is written to
benchmarks/results/kill_evaluate.json.
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

MODELS = ("base=scenes:diffusion", "guided=scenes:diffusion,guidance=2.5")
COMPARED = ("table.csv", "models/*/images/*.png", "models/*/scores/*/*.json")


def start(out: Path, log: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    settings = ["--set", f"num_prompts={options.prompts}", "--set", f"batch_size={options.batch_size}"]
    words = ["-m", "diffexpo", "evaluate", *MODELS, "--suite", "scenes", "--out", str(out), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "NO_COLOR": "1"}
    with log.open("ab") as printed:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=printed,
            stderr=printed,
            env=environment,
            start_new_session=True,
        )


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of the table, of every image and of every batch of scores."""
    files = sorted(path for pattern in COMPARED for path in out.glob(pattern))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written(out: Path) -> int:
    """How many of an evaluation's files are there."""
    return sum(path.is_file() for path in out.rglob("*"))


def where(out: Path) -> str:
    """How far a call had come: images, whole batches of them, and batches of scores."""
    counts = [
        len(list(out.glob(pattern)))
        for pattern in ("models/*/images/*", "models/*/drawn/*", "models/*/scores/*/0*")
    ]
    return "{} images, {} batches drawn, {} judged".format(*counts)


def trial(folder: Path, moments: list[tuple[int, float]], options: argparse.Namespace) -> dict[str, object]:
    """One evaluation that is killed at each of `moments` (so many files, then so many seconds) and then runs to
    its end."""
    out, log, landed = folder / "out", folder / "log.txt", []
    for files, later in moments:
        process = start(out, log, options)
        while process.poll() is None and written(out) < files:
            time.sleep(0.01)
        try:
            process.wait(timeout=later)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            landed.append(where(out))
    code = start(out, log, options).wait()
    return {"landed": landed, "exit": code, "fingerprint": fingerprint(out) if code == 0 else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="number of kills that land")
    parser.add_argument("--kills-per-trial", type=int, default=2, help="kills before a call may end")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_evaluate.json")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "truth").mkdir()
        began = time.perf_counter()
        truth = trial(root / "truth", [], options)
        seconds = time.perf_counter() - began
        if truth["exit"] != 0:
            sys.exit((root / "truth" / "log.txt").read_text()[-2000:])
        print(f"uninterrupted: {seconds:.1f} s, {len(truth['fingerprint'])} files", flush=True)
        total = written(root / "truth" / "out")
        rows: list[dict[str, object]] = []
        kills = same = 0
        while kills < options.kills:
            folder = root / f"trial-{len(rows)}"
            folder.mkdir()
            drawn = ((draw.randint(0, total), draw.random()) for _ in range(options.kills_per_trial))
            moments = sorted(drawn)
            outcome = trial(folder, moments, options)
            is_same = outcome["fingerprint"] == truth["fingerprint"]
            same += is_same
            kills += len(outcome["landed"])
            rows.append(
                {
                    "moments": moments,
                    "landed": outcome["landed"],
                    "exit": outcome["exit"],
                    "identical": is_same,
                }
            )
            print(
                f"{len(rows)}: killed at {outcome['landed']}: {'identical' if is_same else 'DIFFERENT'}",
                flush=True,
            )
            if not is_same:
                print((folder / "log.txt").read_text()[-2000:])
        result = {
            "models": MODELS,
            "prompts": options.prompts,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "kills_landed": kills,
            "trials": len(rows),
            "identical": same,
            "files_compared": len(truth["fingerprint"]),
            "uninterrupted_s": seconds,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "rows": rows,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{same} of {len(rows)} evaluations ended identical after {kills} kills")
    sys.exit(0 if same == len(rows) else 1)


if __name__ == "__main__":
    main()
