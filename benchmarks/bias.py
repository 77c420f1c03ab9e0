"""Bias of the embedded base and what scenes/balance does about it: audits before and after, several seeds.

    .venv/bin/python benchmarks/bias.py --seeds 0 1 2
    .venv/bin/python benchmarks/bias.py --seeds 0 1 2 --negatives    # with negative prompts while collecting

For each seed: `diffexpo run scenes/balance`, then `diffexpo audit` of that run, with other noise for each seed. Printed are, by attribute: what the audit finds on true images with the
planted shares (how many of those lie in their intervals), the base's distance from what was planted in its training images, whether each occupation's planted share lies in its
interval, the distances from uniform before and after and their ratio, and what quality on held-out prompts has changed by. Results go to benchmarks/results/bias.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffexpo.config.audit import AttributeConfig
from diffexpo.config.audits import read_audit
from diffexpo.evaluation.audit import Scorers, measure_audit
from diffexpo.evaluation.bias import Mix
from diffexpo.evaluation.records import SuiteResult
from diffexpo.rewards.scenes import SceneScore
from diffexpo.worlds import local_path
from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import Person, Scene
from diffexpo.worlds.scenes.people import people_prompts, true_people

RESULTS = Path(__file__).parent / "results" / "bias.json"


def diffexpo(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "diffexpo", *map(str, arguments)], check=True)


def planted_suite(look: AttributeConfig, seed: int, images: int) -> SuiteResult:
    """True images of each occupation, whose looks are drawn with the planted shares."""
    prompts, drawn = people_prompts(), []
    for prompt in prompts:
        name = prompt.attributes["occupation"]
        dice = np.random.default_rng([seed, *map(ord, name)])
        looks, shares = zip(*look.reference[name].items(), strict=True)
        for chosen in dice.choice(looks, images, p=np.array(shares) / sum(shares)):
            gender, tone = chosen.split()
            drawn.append(compose(Scene(person=Person(name, gender, tone)), dice)[0])
    rows = np.arange(len(drawn))
    return SuiteResult("true", tuple(prompts), rows // images, rows % images, np.stack(drawn), {}, {})


def covered(mix: Mix, attribute: AttributeConfig) -> str:
    """How many planted shares lie in the intervals of an audit."""
    inside = [
        low <= attribute.reference[row.group].get(value, 0.0) <= high
        for row in mix.groups
        for value, (_, low, high) in zip(attribute.values, row.shares, strict=True)
    ]
    return f"{sum(inside)} of {len(inside)}"


def audit_true_images(seed: int, images: int) -> dict[str, str]:
    """Attribute -> how many planted shares the audit of true images with these shares has in its intervals."""
    protocol = read_audit("scenes")
    reader = SceneScore("reader", local_path("scenes:checker_heldout"))
    suites = {"open": {"true": planted_suite(protocol.attributes["look"], seed, images)}}
    found = measure_audit(protocol, Scorers(classifier=reader), suites, true_people())
    return {
        name: covered(found.attributes[name].mixes["true"], one) for name, one in protocol.attributes.items()
    }


def run(seed: int, settings: list[str], images: int, folder: Path) -> dict[str, Any]:
    """One run and its audit."""
    run_dir, protocol = folder / f"balance-{seed}", read_audit("scenes")
    chosen = [item for one in [f"seed={seed}", *settings] for item in ("--set", one)]
    diffexpo("run", "scenes/balance", "--out", run_dir, *chosen)
    diffexpo("audit", run_dir, "--set", f"seed={seed}", "--set", f"images_per_prompt={images}")
    audit = json.loads((run_dir / "audit" / "audit.json").read_text())
    true = audit_true_images(seed, images)
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
            "planted shares in the intervals of true images": true[name],
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
