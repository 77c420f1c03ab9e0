"""The only place where configuration becomes objects. Data flows: cli -> build -> online -> training -> algorithms.

aliases     embedded names
objects     policy, prompts, rewards, ranking, engine, store, loop
runs        the whole run, one stage of it, the plan, the offline baseline
evaluating  which version is judged by whom, and where the result goes
folders     the run folder's own files
improving   the improvement model of a run
sweep       the improvement model over its guidance scales
actions     what can be done with an existing run
verifying   whether a scorer is what it should be
"""

from diffexpo.build.actions import export, export_pairs, inspect, regenerate, report
from diffexpo.build.aliases import resolve
from diffexpo.build.runs import plan, run, stage
from diffexpo.build.sweep import sweep
from diffexpo.build.verifying import require_passed, verify_rewards, write_scores

__all__ = [
    "export",
    "export_pairs",
    "inspect",
    "plan",
    "regenerate",
    "report",
    "require_passed",
    "resolve",
    "run",
    "stage",
    "sweep",
    "verify_rewards",
    "write_scores",
]
