"""The only place where configuration becomes objects. Data flows: cli -> build -> online -> training -> algorithms.

aliases     embedded names
objects     policy, prompts, rewards, ranking, engine, store, loop
runs        the whole run, one stage of it, the plan, the offline baseline
evaluating  which version is judged by whom, and where the result goes
folders     the run folder's own files
actions     what can be done with an existing run
"""

from diffexpo.build.actions import export, export_pairs, inspect, regenerate, report
from diffexpo.build.aliases import resolve
from diffexpo.build.runs import plan, run, stage

__all__ = ["export", "export_pairs", "inspect", "plan", "regenerate", "report", "resolve", "run", "stage"]
