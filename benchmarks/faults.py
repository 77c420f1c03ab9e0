"""Every operation of a tiny run on its files as a point of failure: what was promised after each.

    .venv/bin/python -m benchmarks.faults                      all points, all kinds: hours on one core
    .venv/bin/python -m benchmarks.faults --every 10           every tenth point
    .venv/bin/python -m benchmarks.faults --kinds kill ENOSPC

One run to which nothing happens is counted (`tests/faults/shim.py`) and is the truth. Then each operation is, in
a new run, the moment of a SIGKILL, of a SIGKILL after a half of what was to be written, or of a refusal: disk full
from there on (ENOSPC, EDQUOT), or this operation failing once (EIO). The run is resumed and compared: weights, pairs, metrics,
evaluations; nothing may be called finished without report and export, and a refusal is exit code 4 and one
sentence, or is not noticed at all (a log). Results: benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.points import Bench
from tests.world import make_world

KINDS = ("kill", "torn", "ENOSPC", "EDQUOT", "EIO")
RESULTS = Path(__file__).parent / "results" / "faults.json"


def points(operations: list[str], kind: str, every: int) -> list[int]:
    """Places where the kind means something: a half is written by writes alone."""
    found = [i for i, line in enumerate(operations) if kind != "torn" or line.startswith("write ")]
    return found[::every]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--every", type=int, default=1, help="only every n-th point")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diffexpo-faults-") as folder:
        (world := Path(folder) / "world").mkdir()
        bench = Bench(make_world(world) / "recipe.yaml", Path(folder))
        done = bench.run("whole")
        assert done.code == 0, done.err
        operations = bench.operations("whole")
        tried: Counter[str] = Counter()
        failed: list[dict[str, object]] = []
        began = time.monotonic()
        for kind in chosen.kinds:
            for at in points(operations, kind, chosen.every):
                broken = bench.run("broken", at, kind)
                problems = bench.problems("broken", kind, broken, bench.folder / "whole")
                tried[kind] += 1
                if problems:
                    failed.append({"kind": kind, "at": at, "operation": operations[at], "problems": problems})
                    print(f"{kind} at {at} ({operations[at]}): {'; '.join(problems)}", flush=True)
                shutil.rmtree(bench.folder / "broken", ignore_errors=True)
            print(
                f"{kind}: {tried[kind]} points, {sum(one['kind'] == kind for one in failed)} not as promised"
            )
    minutes = round((time.monotonic() - began) / 60, 1)
    found = {"operations": len(operations), "tried": dict(tried), "failed": failed, "minutes": minutes}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
