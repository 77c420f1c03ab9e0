"""A process that comes late to a stage takes part in it, whatever rank 0 has finished meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffexpo.assembly.objects import import_pairs
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.online.stages.pair import pair
from diffexpo.training.distributed import World
from tests.learning.toy import make_loop, make_policy, online_config


@dataclass(frozen=True)
class LateProcess(World):
    """Rank 1 of two. Rank 0 looked for the stage's manifest before it began, and has written it since."""

    rank: int = 1
    size: int = 2
    barriers: list[str] = field(default_factory=list)
    answer: bool = False

    def barrier(self) -> None:
        self.barriers.append("barrier")

    def broadcast_object(self, value: Any) -> Any:
        return self.answer


def test_a_late_process_meets_the_others_at_the_stage_s_barrier(tmp_path: Path) -> None:
    config = online_config("vp", explore={"iterations": 2, "prompts_per_iteration": 24})
    policy = make_policy("vp", "full")
    loop = make_loop(config, policy, tmp_path, offline_pairs=64)
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    assert loop.store.is_complete("pair", 1) and loop.store.is_complete("offline", 0)
    before = loop.store.pairs(1)
    late = LateProcess()
    assert pair(replace(loop, world=late), 1) is None
    assert late.barriers == ["barrier"]
    import_pairs(config, policy, loop.store, loop.console, None, replace(late, answer=True))
    # The import is shared: without this process it cannot have ended meanwhile, so the first one's answer is so.
    assert late.barriers == ["barrier"]
    assert loop.store.pairs(1) == before
