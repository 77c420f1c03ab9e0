"""The losses are pure functions on (B,) tensors; nothing else of the package is needed to use them.

python examples/loss_on_tensors.py
"""

import torch

from diffexpo.algorithms import diffusion_dpo_loss, expo_loss

# Mean squared prediction errors of the policy and of the reference on winners and losers, at shared noise and
# time.
winner, loser = torch.tensor([0.10, 0.20]), torch.tensor([0.12, 0.19])
winner_ref, loser_ref = torch.tensor([0.11, 0.20]), torch.tensor([0.11, 0.20])

print("Diffusion-DPO:", diffusion_dpo_loss(winner, loser, winner_ref, loser_ref, beta=100.0))
print("policy = reference:", diffusion_dpo_loss(winner, loser, winner, loser, beta=100.0), "(ln 2)")

# One contrast couple: an image of the exploration agent and one of the main agent.
explored, main = torch.tensor([0.15]), torch.tensor([0.14])
print(
    "EXPO:",
    expo_loss(winner, loser, winner_ref, loser_ref, explored, main, explored, main, beta=100.0, alpha=0.1),
)
