"""Damaged files of a run: each is named, or made good with the same result.

    .venv/bin/python -m benchmarks.damages --count 300

A tiny run that has ended, and one that was killed in its second iteration, are copied again and again. In each copy one
file is damaged: one bit flipped, the end cut off, a part overwritten with zeros, the file emptied or gone, or another
file's content in its place; every file gets its turn, kind and place come from a seed. Of a run that has ended
`diffexpo verify` must name the file, unless its results are read as before. A run that was killed is resumed: it must end with
the same weights, pairs, metrics and evaluations, or name the file, in the sentence that refuses it or in a warning.
Results: benchmarks/results/damages.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffexpo.assembly.soundness import verify_run
from tests.faults.points import Bench, has_ended, outcome
from tests.world import make_world

RESULTS = Path(__file__).parent / "results" / "damages.json"
ELSEWHERE = ("log.txt", "run.lock", "env.json")
"""Files from which nothing is read back: a record for people, a lock, what the run was made with."""
SEEN = ("report.html", "summary.json", "contenders.json", "grid.png", "pairs.json", "README.md")
"""Results that people look at and the comparison below does not see."""


def flip(data: bytes, dice: random.Random, other: bytes) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]


def cut(data: bytes, dice: random.Random, other: bytes) -> bytes:
    return data[: dice.randrange(len(data))]


def zero(data: bytes, dice: random.Random, other: bytes) -> bytes:
    place = dice.randrange(len(data))
    end = min(len(data), place + dice.randint(1, 512))
    return data[:place] + bytes(end - place) + data[end:]


def empty(data: bytes, dice: random.Random, other: bytes) -> bytes:
    return b""


def exchange(data: bytes, dice: random.Random, other: bytes) -> bytes:
    return other


def gone(data: bytes, dice: random.Random, other: bytes) -> None:
    return None


DAMAGES: tuple[Callable[[bytes, random.Random, bytes], bytes | None], ...] = (
    flip, cut, zero, empty, exchange, gone,
)  # fmt: skip


def files_of(run_dir: Path) -> list[Path]:
    """Every file of a run, from which something may be read back, by name."""
    found = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
    return [path for path in found if path.name not in ELSEWHERE]


def damage(run_dir: Path, file: Path, dice: random.Random) -> str:
    """Do it; the kind that was done, "" where the content stayed what it was."""
    kind, path = dice.choice(DAMAGES), run_dir / file
    data = path.read_bytes()
    alike = [other for other in files_of(run_dir) if other.suffix == file.suffix and other != file]
    other = (run_dir / dice.choice(alike)).read_bytes() if alike else b"x"
    changed = kind(data, dice, other) if data else other
    if changed == data:
        return ""
    path.unlink() if changed is None else path.write_bytes(changed)
    return kind.__name__


def names(text: str, file: Path) -> bool:
    """Whether a person who reads the text knows which file it is, or the folder that holds it; of config.yaml
    also by the settings that are others, of a list of checksums by files that do not match it."""
    signs = {"config.yaml": "the setting ", "SHA256SUMS": " since "}
    is_told = file.name in signs and signs[file.name] in text
    return is_told or file.stem in text or (file.parent != Path() and str(file.parent) in text)


def after_the_end(run_dir: Path, file: Path, truth: object) -> str:
    """What is wrong about a damaged run that had ended; "" is nothing."""
    try:
        failed = [finding.what for finding in verify_run(run_dir) if finding.state == "fail"]
        if failed:
            return "" if names("\n".join(failed), file) else f"named otherwise: {failed[0][:200]}"
        is_same = outcome(run_dir) == truth and has_ended(run_dir) and file.name not in SEEN
        return "" if is_same else "silently other results"
    except Exception as error:  # noqa: BLE001  any is a fault of verify
        return f"verify does not end: {error!r}"


def in_order(found: dict[str, Any]) -> dict[str, Any]:
    """What came out, with the metrics in one order: a stage that was lost is done again after others."""
    return found | {"metrics": sorted(map(json.dumps, found["metrics"]))}


def on_the_way(bench: Bench, run_dir: Path, file: Path, truth: dict[str, Any]) -> str:
    """What is wrong about a damaged run that was resumed; "" is nothing."""
    done = bench.resume(run_dir.name)
    if "defect" in done.err or "Traceback" in done.err:
        return f"calls it a defect: {done.err[-300:]}"
    warned = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    if names("\n".join([done.err, *warned]), file):
        return ""
    if done.code == 0:
        is_same = in_order(outcome(run_dir)) == in_order(truth)
        return "" if has_ended(run_dir) and is_same else "silently other results"
    return f"ends with {done.code}: {done.err[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diffexpo-damages-") as folder:
        (world := Path(folder) / "world").mkdir()
        bench = Bench(make_world(world) / "recipe.yaml", Path(folder))
        assert bench.run("whole").code == 0
        bench.run("killed", int(0.7 * len(bench.operations("whole"))), "kill")
        truth, dice, began = outcome(bench.folder / "whole"), random.Random(asked.seed), time.monotonic()
        tried: Counter[str] = Counter()
        failed: list[dict[str, str]] = []
        queues = {name: files_of(bench.folder / name) for name in ("whole", "killed")}
        for number in range(asked.count):
            name = "killed" if number % 2 else "whole"
            file = queues[name][number // 2 % len(queues[name])]
            run_dir = bench.folder / "copy"
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(bench.folder / name, run_dir)
            kind = ""
            while not kind:
                kind = damage(run_dir, file, dice)
            problem = after_the_end(run_dir, file, truth) if name == "whole" else ""
            problem = problem or (on_the_way(bench, run_dir, file, truth) if name == "killed" else "")
            tried[f"{name}: {kind}"] += 1
            if problem:
                failed.append({"run": name, "file": str(file), "damage": kind, "problem": problem})
                print(f"{name}: {file}, {kind}: {problem}", flush=True)
    print(
        f"{sum(tried.values())} damages of {sum(map(len, queues.values()))} files, {len(failed)} not as promised"
    )
    found = {
        "files": {name: len(files) for name, files in queues.items()},
        "tried": dict(sorted(tried.items())),
    }
    minutes = round((time.monotonic() - began) / 60, 1)
    RESULTS.write_text(json.dumps(found | {"failed": failed, "minutes": minutes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
