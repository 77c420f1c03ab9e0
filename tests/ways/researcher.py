"""A researcher: an own loss, two seeds of it and of Diffusion-DPO, compared. Run where recipe.yaml is."""

import torch

import diffexpo


def hinge(winner, loser, winner_ref, loser_ref):
    margin = (loser - loser_ref) - (winner - winner_ref)
    return torch.relu(1.0 - 100.0 * margin)


LOSSES = {"hinge": {"algorithm": hinge}, "dpo": {"algorithm": {"type": "diffusion_dpo", "beta": 200.0}}}
runs = {
    (name, seed): diffexpo.run("recipe.yaml", settings=loss, seed=seed, name=f"{name}-{seed}", quiet=True)
    for name, loss in LOSSES.items()
    for seed in (1, 2)
}
for (name, seed), run in runs.items():
    share, low, high = run.win_rate.interval
    losses = run.metrics("train")["train/loss"].to_pylist()
    print(f"{name} seed {seed}: win rate {share:.2f} ({low:.2f} to {high:.2f}), last loss {losses[-1]:.3f}")

# What the seed alone moves, beside what the loss moves.
rates = {key: run.win_rate.rate for key, run in runs.items()}
print(
    "between seeds",
    abs(rates["hinge", 1] - rates["hinge", 2]),
    "between losses",
    abs(rates["hinge", 1] - rates["dpo", 1]),
)
again = diffexpo.open_run("runs/hinge-1")
print(again.win_rate == runs["hinge", 1].win_rate, again.config.algorithm.type)
