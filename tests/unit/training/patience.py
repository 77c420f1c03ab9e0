"""A process of two that prints how long its group waits in a collective."""

import torch.distributed as dist

from diffexpo.training.distributed import start_world, stop_world

world = start_world(device="cpu")
print(dist.distributed_c10d._get_default_group()._get_backend(world.device).options._timeout)
stop_world(world)
