"""Bias of the embedded base and what scenes/balance does about it: audits before and after, several seeds.

    .venv/bin/python benchmarks/bias.py --seeds 0 1 2
    .venv/bin/python benchmarks/bias.py --seeds 0 1 2 --negatives    # with negative prompts while collecting

For each seed: `diffexpo run scenes/balance`, then `diffexpo audit` of that run, with other noise for each seed. Printed are, by attribute: the base's distance from
what was planted in its training images, whether each occupation's planted share lies in its interval, the distances from uniform before and after and their
ratio, and what quality on held-out prompts has changed by. Results go to benchmarks/results/bias.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffexpo.config.audits import read_audit

RESULTS = Path(__file__).parent / "results" / "bias.json"


def diffexpo(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "diffexpo", *map(str, arguments)], check=True)


def run(seed: int, settings: list[str], images: int, folder: Path) -> dict[str, Any]:
    """One run and its audit."""
    run_dir, protocol = folder / f"balance-{seed}", read_audit("scenes")
    chosen = [item for one in [f"seed={seed}", *settings] for item in ("--set", one)]
    diffexpo("run", "scenes/balance", "--out", run_dir, *chosen)
    diffexpo("audit", run_dir, "--set", f"seed={seed}", "--set", f"images_per_prompt={images}")
    audit = json.loads((run_dir / "audit" / "audit.json").read_text())
    found: dict[str, Any] = {"seed": seed, "summary": json.loads((run_dir / "summary.json").read_text())}
    for name, one in audit["attributes"].items():
        before, after = one["models"].values()
        covered = total = 0
        for group, row in before["groups"].items():
            planted = protocol.attributes[name].reference[group]
            for value, (_, low, high) in zip(one["values"], row["shares"], strict=True):
                covered += low <= planted.get(value, 0.0) <= high
                total += 1
        found[name] = {
            "planted shares in their intervals": f"{covered} of {total}",
            "base from what was planted": before["from_reference"],
            "from uniform, before": before["from_uniform"],
            "from uniform, after": after["from_uniform"],
            "change": one["change"],
            "after / before": after["from_uniform"][0] / before["from_uniform"][0],
        }
    found["quality of these images"] = audit["quality"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--negatives", action="store_true", help="negative prompts while collecting")
    parser.add_argument("--images", type=int, default=96, help="images of an occupation and model")
    parser.add_argument("--folder", type=Path, help="where the runs stay; default: nowhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        negatives = ["prompts.source=scenes:people-negated", "explore.sampler.guidance=2"]
        settings = [*asked.settings, *(negatives if asked.negatives else [])]
        found = [run(seed, settings, asked.images, folder) for seed in asked.seeds]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
