"""benchmarks/without_reward.py: verdicts follow their rules, tables their numbers, and every arm's settings make a valid run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import without_reward as bench
from diffexpo.config import load_config
from diffexpo.online.cost import run_cost

PROMPTS = {"train": [f"t{i}" for i in range(30)], "heldout": [f"h{i}" for i in range(40)]}
COST = {"evaluations": 14208.0, "judging": 0.0, "seconds": 100.0}


def row(shift: dict[str, float], vendi: float) -> dict[str, object]:
    """Scores that lie above the base's by `shift`, but for a wobble."""
    scores = {}
    for group, names in PROMPTS.items():
        wobble = 0.2 * np.sin(np.arange(len(names)) + 10 * shift[group])
        scores[group] = {judge: (7 + shift[group] + wobble).tolist() for judge in bench.JUDGES}
    return {
        "scores": scores,
        "vendi": {group: [vendi + 0.01 * i for i in range(6)] for group in PROMPTS},
        "prompts": PROMPTS,
        "cost": COST,
    }


def results(**arms: tuple[float, float, float]) -> dict[str, dict[str, dict[str, object]]]:
    return {
        arm: {f"seed-{seed}": row({"train": train, "heldout": heldout}, vendi) for seed in (0, 1)}
        for arm, (train, heldout, vendi) in arms.items()
    }


WORLD = {
    "base": (0.0, 0.0, 2.0),
    "diffusion_dpo": (1.0, 1.0, 1.5),
    "spin": (0.5, 3.0, 2.5),
    "improver": (3.0, 1.0, 2.0),
    "improvement_dpo": (2.0, 2.0, 2.0),
    "improvement_dpo_32": (1.0, 1.0, 2.0),
}


def test_verdicts_follow_the_rules_of_the_page() -> None:
    found = {text: verdict for text, _, verdict in bench.claims(results(**WORLD), 300)}
    by_start = lambda start: next(verdict for text, verdict in found.items() if text.startswith(start))
    assert by_start("iterating with the improvement model beats") == "holds"
    assert by_start("it beats Diffusion-DPO") == "holds"
    assert by_start("it beats SPIN") == "does not hold"
    assert by_start("more diverse than SPIN") == "does not hold"
    assert by_start("more diverse than Diffusion-DPO") == "holds"
    assert by_start("more online pairs") == "holds"
    assert by_start("the improvement model used directly") == "holds"
    assert by_start("started from SPIN") == by_start("EXPO improves the base when a reward") == "not run"
    assert "not run" not in bench.claim_table(results(**WORLD), 300)


def test_half_a_claim_is_no_claim_and_doubt_is_said() -> None:
    worse = results(**(WORLD | {"improver": (3.0, 4.0, 2.0)}))
    (verdict,) = [one for text, _, one in bench.claims(worse, 300) if "used directly" in text]
    assert verdict == "does not hold"
    assert bench.above({"low": 0.4, "high": 0.6}, 0.5) == "undecided"
    assert bench.above({"low": 0.5, "high": 0.6}, 0.5) == "undecided"
    assert bench.all_of("holds", "undecided") == "undecided"
    assert bench.all_of("undecided", "does not hold") == "does not hold"
    assert bench.all_of("does not hold", "not run") == "not run"


def test_agreement_is_the_share_of_couples_and_of_best_against_worst() -> None:
    rows = {"seed-0": {"scores": {"a": [[1, 2, 3], [1, 1, 1]], "b": [[1, 3, 2], [1, 2, 3]]}}}
    found = bench.agreements(rows, "a", "b", 200)
    # 2 of 3 couples; of the second prompt nothing is decided, which counts 1/2; its best and worst are the same image.
    assert found["alike"]["mean"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert found["best"]["mean"] == pytest.approx((1.0 + 0.5) / 2)
    same = bench.agreements(rows, "b", "b", 200)
    assert same["alike"]["mean"] == same["best"]["mean"] == 1.0


def test_results_are_written_with_their_prompts_once_and_come_back(tmp_path: Path) -> None:
    found = results(**WORLD)
    file = tmp_path / "out.json"
    bench.write_json(file, bench.packed(found))
    assert file.read_text().count('"t29"') == 1
    assert bench.unpacked(json.loads(file.read_text())) == found


def test_the_page_is_filled_between_its_markers_and_only_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = bench.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    before, after = text.split(bench.BEGIN)[0], text.split(bench.END)[1]
    for words in ("| first |", "| second |"):
        bench.fill_page(page, words)
        filled = page.read_text(encoding="utf-8")
        assert filled.startswith(before) and filled.endswith(after) and words in filled
    assert "| first |" not in filled
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected one line"):
        bench.fill_page(page, "x")


def test_tables_name_every_arm_that_was_run() -> None:
    text = bench.markdown(results(**WORLD), bench.TINY)
    assert all(f"`{arm}`" in text for arm in WORLD)
    assert text.count("### ") == 5 and "`expo_judge`" not in text


@pytest.mark.parametrize("arm", [arm for arm in bench.ARMS if bench.ARMS[arm][0]])
def test_every_arm_is_a_valid_run_and_spends_the_budget(arm: str) -> None:
    recipe, settings, needed = bench.ARMS[arm]
    for name in needed:
        settings = tuple(setting.replace(f"{{{name}}}", "some/folder") for setting in settings)
    config = load_config([f"emoji/{recipe}"], [*bench.COMMON, *settings, "seed=1"], {}).config
    asks_reward = [reward.type for reward in config.rewards if reward.type == "clip"]
    assert asks_reward == (["clip"] if arm == "expo_judge" else [])
    # The improver is trained once for all, and two arms draw fewer pairs on purpose.
    if arm not in ("improver", "improvement_dpo_96", "improvement_dpo_32"):
        cost = run_cost(config)
        assert cost.sampling + cost.training == bench.BUDGET and cost.checks < 0.01 * bench.BUDGET
