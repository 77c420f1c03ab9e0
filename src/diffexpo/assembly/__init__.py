"""The only place where configuration becomes objects. Data flows: cli -> assembly -> online -> training ->
algorithms.

The names below load on first use: a command pays for what it does, not for plots and pipelines of the others.
Errors load at once; they are what the edge of the process turns into exit codes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffexpo.errors import (
    ConfigError,
    DiffexpoError,
    Interrupted,
    MissingError,
    WaitingError,
    memory_failure,
)
from diffexpo.files import explain_refusal

if TYPE_CHECKING:
    from diffexpo.estimate.resources import Advice as Advice
    from diffexpo.estimate.resources import Computing as Computing
    from diffexpo.estimate.resources import Estimate as Estimate
    from diffexpo.evaluation.benchmark_plan import BenchmarkPlan as BenchmarkPlan
    from diffexpo.evaluation.comparison import RunComparison as RunComparison

# Public name -> the module of this package, or the whole name of another's, that defines it. No name is that
# of a module: importing one would take its place.
_HOME = {
    "advise": "diffexpo.estimate.resources",
    "computing": "diffexpo.estimate.resources",
    "estimate": "diffexpo.estimate.resources",
    "audit": "auditing",
    "export": "actions",
    "export_pairs": "actions",
    "inspect": "actions",
    "regenerate": "actions",
    "write_model": "actions",
    "compare_runs": "diffexpo.evaluation.comparison",
    "write_comparison": "diffexpo.evaluation.comparison_page",
    "plan_sweep": "products",
    "run_sweep": "products",
    "write_report": "diffexpo.evaluation.report",
    "Evaluating": "benchmarking",
    "evaluate_models": "benchmarking",
    "plan_evaluation": "benchmark_planning",
    "evaluations_in": "paper_tables",
    "paper_table": "paper_tables",
    "missing_assets": "aliases",
    "check_inputs": "checking",
    "parse_stage": "runs",
    "resolve": "aliases",
    "resolve_model": "aliases",
    "plan": "runs",
    "run": "runs",
    "stage": "runs",
    "open_server": "serving",
    "read_reward": "serving",
    "Store": "diffexpo.data.store",
    "import_prompts": "sets",
    "inspect_offline": "diffexpo.data.offline.summary",
    "rewrite_pairs": "diffexpo.data.offline.writing",
    "summarise_offline": "diffexpo.data.offline.summary",
    "summarise_store": "diffexpo.data.statistics",
    "verify_rewritten": "diffexpo.data.offline.writing",
    "describe_rating": "rating",
    "export_votes": "rating",
    "find_book": "rating",
    "import_votes": "rating",
    "make_rater_links": "rating",
    "raters_of": "rating",
    "revoke_link": "rating",
    "serve_rating": "rating",
    "vote_costs": "rating",
    "new_study": "studies",
    "report_study": "studies",
    "rescore": "rescoring",
    "sweep": "sweeping",
    "track": "tracking",
    "push": "actions",
    "check_repository": "diffexpo.policies.publishing",
    "Watching": "watching",
    "require_passed": "verifying",
    "restore_settings": "soundness",
    "verify_run": "soundness",
    "verify_rewards": "verifying",
    "write_scores": "verifying",
}

__all__ = ["ConfigError", "DiffexpoError", "Interrupted", "MissingError", "WaitingError"]
__all__ += ["explain_refusal", "memory_failure"]
__all__ += list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        known = f"it has {', '.join(sorted(_HOME))}"
        raise AttributeError(f"module 'diffexpo.assembly' has no attribute {name!r}; {known}")
    home = _HOME[name]
    return vars(import_module(home if "." in home else f"diffexpo.assembly.{home}"))[name]
