"""Measure and report: suites of images and judges, win rates, diversity, KL, alarms, and the HTML report.

Loads without torch; `suites` and `divergence` need it.
"""

from diffexpo.evaluation.metrics import (
    WinRate,
    best_of_n_kl,
    bootstrap_mean,
    bradley_terry,
    sign_test,
    vendi_score,
    win_rate,
)

__all__ = [
    "WinRate",
    "best_of_n_kl",
    "bootstrap_mean",
    "bradley_terry",
    "sign_test",
    "vendi_score",
    "win_rate",
]
