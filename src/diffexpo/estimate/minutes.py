"""How long a run will take on this machine, from the speed of one matrix product."""

from __future__ import annotations

import time

import torch

from diffexpo.config import RunConfig
from diffexpo.estimate.networks import flops, sizes_of
from diffexpo.online.cost import evaluation_cost, run_cost
from diffexpo.policies.loading import choose_device
from diffexpo.training.engine import AUTOCAST

SHARE = 0.35
"""Share of a matrix product's speed that a run reached: embedded recipes, which score and decode between
forwards, took 0.3 to 0.45 of it on a CPU."""
SIZE, SECONDS = 1024, 0.2


def minutes_here(config: RunConfig) -> float:
    """Minutes of a run on its device, evaluation included, weights there already: within a factor of two or
    three, since scorers are not counted. Errors are those of `estimate`."""
    each = flops(sizes_of(config).key)
    evaluation, iterates = config.evaluation, config.explore.iterations
    versions = 1 + len(evaluation.base_guidances) + (iterates if evaluation.every_iteration else 1)
    evaluations = run_cost(config).total + versions * evaluation_cost(config)
    return evaluations * each / (SHARE * speed(config)) / 60


def speed(config: RunConfig) -> float:
    """Operations a second of a matrix product on the run's device, in the precision of its forwards; on a CPU
    those of a machine with nothing else to do."""
    device = choose_device(config.model.device)
    dtype = AUTOCAST.get(config.training.mixed_precision) or torch.float32
    factor = torch.ones(SIZE, SIZE, device=device, dtype=dtype)

    def clock() -> float:
        return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()

    count, began = 0, clock()
    while not count or (passed := clock() - began) < SECONDS:
        (factor @ factor)[0, 0].item()  # waits for the device
        count += 1
    return 2 * SIZE**3 * count / passed
