"""Two processes (torchrun, gloo) end with the same pairs as one, and the same weights within rounding.

In float32, over the whole command; `test_every_split` has two processes in float64, to 1e-9 in every weight.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from diffexpo.evaluation.records import load_suite
from tests.commands import ROOT, start
from tests.invariants.conftest import pair_rows, run_arguments
from tests.world import base_weights, distance


def test_two_processes_equal_one(world, truth, tmp_path):
    run_dir = tmp_path / "run"
    # torchrun forks its workers here, so that none of them imports everything again.
    launcher = ["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path"]
    command = [ROOT / "src" / "diffexpo" / "__main__.py", *run_arguments(world, run_dir)]
    done = start(*launcher, *command, module="torch.distributed.run").wait()
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    assert stored(run_dir) == stored(truth) and not (run_dir / "prompts").exists()
    ours, theirs = pair_rows(run_dir), pair_rows(truth)
    names = ("pair_id", "winner_id", "loser_id", "prompt", "explored_id", "main_id")
    assert [[row[name] for name in names] for row in ours] == [
        [row[name] for name in names] for row in theirs
    ]
    for path in sorted((truth / "checkpoints").glob("weights-*.safetensors")):
        one, two = load_file(path), load_file(run_dir / "checkpoints" / path.name)
        assert distance(one, two, base_weights(world / "model")) < 1e-3
    # Both draw the evaluations too; the base is the same for both, so its images and scores are.
    suites = [load_suite(folder / "eval" / "base") for folder in (run_dir, truth)]
    assert np.array_equal(suites[0].images, suites[1].images)
    for name, values in suites[0].scores.items():
        np.testing.assert_array_equal(values, suites[1].scores[name])


def stored(run_dir: Path) -> list[str]:
    """Names of the files of a store, which say nothing of the processes that wrote them."""
    return sorted(path.name for path in (run_dir / "store").iterdir())
