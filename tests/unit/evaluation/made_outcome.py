"""An evaluation of made scores and pictures, on disk as `diffexpo evaluate` leaves it."""

import numpy as np

from diffexpo.config.rewards import read_card
from diffexpo.config.suites import Suite
from diffexpo.evaluation.benchmark import Judge, Judged, Outcome
from diffexpo.evaluation.gallery import Gallery, Rows
from diffexpo.evaluation.kept import keep_suite
from diffexpo.types import Prompt

LOOKS = Judge.of(read_card(name="looks", type="clip", path="x"), "v1", "cosine", "looks-1")
RIGHT = Judge.of(read_card(name="right", type="scene_correct", path="x"), "v2", "1 or 0", "right-1")


def outcome(tmp_path, scores, *, rule="mean", categories=None, trained=(), count=None):
    """An outcome of made scores, model -> judge -> (N,), one image a prompt, on disk too."""
    first = next(iter(next(iter(scores.values())).values()))
    names = categories or ["even", "odd"] * (len(first) // 2)
    prompts = tuple(
        Prompt(f"p{row}", f"a thing {row}", names[row], {"size": "big" if row < 2 else "small"})
        for row in range(len(first))
    )
    suite = Suite(
        name="made",
        title="made scores",
        prompts="made.txt",
        categories=count or {},
        rule=rule,
        batch_size=4,
        groups=("category", "size"),
    )
    rows = Rows(prompts, 1, 4)
    judges = [judge for judge in (RIGHT, LOOKS) if judge.name in next(iter(scores.values()))]
    models = []
    for number, (label, found) in enumerate(scores.items()):
        gallery = Gallery(tmp_path / "models" / label, rows)
        facts = {"label": label, "what": f"model {label}", "identity": label, "guidance": None}
        gallery.claim(facts, "")
        for batch in rows.batches:
            images = [np.full((4, 4, 3), (10 * row + number) % 256, np.uint8) for row in rows.of(batch)]
            gallery.keep(batch, images, seconds=2.0, evaluations=10)
            for judge in judges:
                gallery.keep_scores(
                    judge.key, batch, np.asarray(found[judge.name])[list(rows.of(batch))].tolist()
                )
        for judge in judges:
            gallery.keep_judge(judge.key, vars(judge) | {"trained": (label, judge.name) in trained})
        by = tuple(judge for model, judge in trained if model == label)
        models.append(
            Judged(
                label,
                f"model {label}",
                gallery,
                {name: np.asarray(v, float) for name, v in found.items()},
                by,
            )
        )
    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    keep_suite(tmp_path, suite, rows, order)
    return Outcome(suite, rows, tuple(models), tuple(judges), order)
