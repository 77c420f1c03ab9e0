"""Two evaluations of the same prompts and noise, image by image, even from two runs.

    python examples/compare_evaluations.py runs/scenes_expo/eval/iteration-4 runs/guided/eval/base correct

prints the mean score of each under a judge, the mean difference with its 95% interval over prompts, and how
many images the first and the second one has better.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import load_suite


def main(first: str, second: str, judge: str) -> None:
    """Compare two folders of `eval/` under a judge that both have."""
    left, right = (load_suite(Path(folder)).by_image(judge) for folder in (first, second))
    shared = [key for key in left if key in right]
    change = np.array([left[key] - right[key] for key in shared])
    mean, low, high = bootstrap_mean(change, [prompt for prompt, _ in shared])
    means = (np.mean([scores[key] for key in shared]) for scores in (left, right))
    print("{} images: {:.4f} against {:.4f}".format(len(shared), *means))
    print(f"difference {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(f"better {int((change > 0).sum())}, worse {int((change < 0).sum())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
