"""One of several processes of a run: it works until the others have to be waited for, is slow, or stops."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch

from diffexpo.errors import ConfigError, Interrupted
from diffexpo.training import distributed, group
from diffexpo.training.signals import StopSignal


def main(what: str) -> int:
    group.SILENCE_S = 2.0
    if what == "slow":
        distributed.PATIENCE = timedelta(seconds=3)
    world = distributed.start_world("cpu")
    assert world.group is not None
    with StopSignal() as stop:
        world.group.on_loss = stop.stop
        try:
            work(what, world, stop)
        except (Interrupted, ConfigError) as error:
            print(error, file=sys.stderr, flush=True)
            distributed.stop_world(world, error)
            return error.exit_code
    distributed.stop_world(world)
    return 0


def work(what: str, world: distributed.World, stop: StopSignal) -> None:
    print("ready", flush=True)
    if what == "slow":  # the others wait for longer than a collective may take
        if world.rank == 0:
            time.sleep(6)
        world.barrier()
        ones = torch.ones(1)
        world.all_reduce_sum([ones])
        assert world.gather_objects([ones.item()]) == [2.0, 2.0]
    elif what == "differ":
        world.refuse_difference({"the run folder": f"/tmp/{world.rank}"}, "start them alike")
    elif what == "draw":  # own work for minutes, without a word to the others
        while True:
            time.sleep(0.05)
            stop.check()
    elif what == "long" and world.rank == 0:  # a unit of work that takes longer than the others wait to speak
        while stop.received is None:
            time.sleep(0.02)
        time.sleep(group.NOTICE_S + 1)
        stop.check()
    elif what == "long":
        while True:
            time.sleep(0.02)
            stop.check()
    elif what == "wait" and world.rank == 0:
        world.barrier()
    elif what == "reduce" and world.rank == 0:
        world.all_reduce_sum([torch.ones(1)])
    else:
        time.sleep(100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
