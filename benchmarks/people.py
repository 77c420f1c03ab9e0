"""People in the loop from end to end, with simulated raters, and a study of what they made.

    .venv/bin/python benchmarks/people.py --seeds 0 1 2
    .venv/bin/python benchmarks/people.py --couples tournament

No person is meant: five careful raters answer by a checker of scenes with noise (they prefer the left image with
probability sigmoid((score_left - score_right) / 0.54), the temperature of the shipped offline pairs, and always see through
attention checks), and three careless ones answer by chance. EXPO learns from their votes alone (`type: human`). What comes out
is judged by a third model, the held-out checker, which neither raters nor training have seen; the raters then compare base and result in
a study. Win rates and Krippendorff's alpha are computed again from the exported votes, without our code. Results go to
benchmarks/results/people.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from diffexpo.assembly.studies import new_study, report_study
from diffexpo.evaluation.audit import as_tensor
from diffexpo.evaluation.records import read_image
from diffexpo.labelling.asking import answer, open_tasks
from diffexpo.labelling.book import CHECK, Book
from diffexpo.labelling.counting import left_out
from diffexpo.labelling.links import make_links
from diffexpo.rewards.scenes import SceneScore
from diffexpo.types import Reward
from diffexpo.worlds import local_path

RESULTS = Path(__file__).parent / "results" / "people.json"
TEMPERATURE = 0.54
CAREFUL, CARELESS, WAITING = 5, 3, 76
QUIET = "exclude: {seconds_below: 0}"  # simulated raters take no time


class Raters:
    """Eight simulated raters of a book."""

    def __init__(self, taste: Reward, seed: int) -> None:
        self._taste, self._random = taste, random.Random(seed)
        self._scores: dict[tuple[str, str], float] = {}

    def _score(self, book: Book, image: str, prompt: str) -> float:
        if (image, prompt) not in self._scores:
            with torch.no_grad():
                pixels = as_tensor(read_image(book.image_path(image))[None])
                self._scores[image, prompt] = float(self._taste.score(pixels, [prompt])[0])
        return self._scores[image, prompt]

    def answer_all(self, folder: Path) -> None:
        """Let all of them answer in turn until nothing is left."""
        with Book(folder) as book:
            book.rows("PRAGMA synchronous = OFF")
            if not book.raters():
                names = [f"careful {n}" for n in range(CAREFUL)] + [f"careless {n}" for n in range(CARELESS)]
                make_links(book, names)
            raters, waiting = book.raters(), True
            for rater in raters:
                book.consent(rater.rater)
            while waiting:
                waiting = False
                for rater in raters:
                    for task in open_tasks(book, rater.rater)[:1]:
                        waiting = True
                        answer(book, rater.rater, task.task, self._choose(book, task, rater.name))

    def _choose(self, book: Book, task: object, name: str) -> str:
        if name.startswith("careless"):
            return self._random.choice(["left", "right"])
        ((kind, swapped),) = book.rows("SELECT kind, swapped FROM tasks WHERE task = ?", task.task)  # type: ignore[attr-defined]
        if kind == CHECK:
            return "right" if swapped else "left"
        left, right = (self._score(book, image, task.prompt) for image in (task.left, task.right))  # type: ignore[attr-defined]
        return "left" if self._random.random() < 1 / (1 + np.exp((right - left) / TEMPERATURE)) else "right"


def diffexpo(*arguments: str | Path) -> int:
    return subprocess.run([sys.executable, "-m", "diffexpo", *map(str, arguments)], check=False).returncode


def alpha_again(units: Sequence[Sequence[float]]) -> float:
    """Nominal alpha by its definition, over all couples of answers."""
    kept = [unit for unit in units if len(unit) > 1]
    total = sum(map(len, kept))
    observed = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in kept) / total
    counts = np.unique(np.concatenate(kept), return_counts=True)[1]
    return 1 - observed / ((total**2 - (counts**2).sum()) / (total * (total - 1)))


def study_again(folder: Path) -> float:
    """The largest difference between a study's report and the same numbers from its exported votes."""
    numbers = json.loads((folder / "report.json").read_text())
    rows = [
        row
        for row in pq.read_table(folder / "votes.parquet").to_pylist()
        if row["kind"] == "vote" and not row["is_left_out"] and row["answer"] != "skip"
    ]
    gaps = []
    for one in numbers["comparisons"]:
        own = [row for row in rows if row["question"] == one["question"]]
        values = [
            0.5 if row["answer"] not in "ab" else float(row[row["answer"]] == one["first"]) for row in own
        ]
        gaps.append(abs(float(np.mean(values)) - one["rate"]))
    for one in numbers["agreement"]:
        units: dict[str, list[float]] = {}
        for row in (row for row in rows if row["question"] == one["question"]):
            units.setdefault(row["prompt_id"], []).append("ab".find(row["answer"][0]))
        gaps.append(abs(alpha_again(list(units.values())) - one["alpha"]))
    return max(gaps)


def run(seed: int, couples: str, folder: Path) -> dict[str, object]:
    """One run with its study."""
    raters = Raters(SceneScore("taste", local_path("scenes:checker_train")), seed)
    run_dir, study = folder / f"run-{seed}", folder / f"study-{seed}"
    human = f"{{type: human, question: alignment, votes: 3, couples: {couples}, rating: {{{QUIET}}}}}"
    settings = [f"rewards=[{human}]", f"seed={seed}", "explore.iterations=3"]
    code = diffexpo(
        "run", "scenes/quick", "--out", run_dir, *itertools.chain(*(("--set", one) for one in settings))
    )
    while code == WAITING:
        raters.answer_all(run_dir / "labels")
        code = diffexpo("run", "--resume", run_dir)
    assert code == 0, code
    summary = json.loads((run_dir / "summary.json").read_text())
    models = {"base": f"{run_dir}:base", "EXPO": f"{run_dir}:iteration-3"}
    given = {
        "name": "simulated raters",
        "models": models,
        "raters": 8,
        "votes": 3,
        "prompts": 60,
        "bootstrap": 2000,
    }
    new_study(study, None, given | {"questions": ["alignment"], "rating": {"exclude": {"seconds_below": 0}}})
    raters.answer_all(study)
    report_study(study)
    numbers = json.loads((study / "report.json").read_text())
    with Book(run_dir / "labels") as book:
        out = {rater.name for rater in book.raters() if rater.rater in left_out(book)}
        votes = len([vote for vote in book.votes() if vote.kind == "vote"])
    return {
        "seed": seed,
        "couples": couples,
        "votes": votes,
        "careless found": sum(name.startswith("careless") for name in out),
        "careful left out": sum(name.startswith("careful") for name in out),
        "third judge": summary,
        "study": numbers["comparisons"],
        "agreement": numbers["agreement"],
        "difference from independent numbers": study_again(study),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--couples", choices=["random", "tournament"], default="random")
    parser.add_argument("--folder", type=Path, help="where runs and studies stay; default: nowhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = [run(seed, asked.couples, asked.folder or Path(temporary)) for seed in asked.seeds]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for one in found:
        print(json.dumps(one, indent=1))
        assert float(str(one["difference from independent numbers"])) < 1e-9


if __name__ == "__main__":
    main()
