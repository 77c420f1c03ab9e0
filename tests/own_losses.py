"""Losses as a user writes them, for `algorithm.type: python`."""

import torch


def dpo(winner, loser, winner_ref, loser_ref):
    """Diffusion-DPO with beta 30."""
    margin = (loser - loser_ref) - (winner - winner_ref)
    return -torch.nn.functional.logsigmoid(15.0 * margin)


def fit_winners(winner, loser, winner_ref, loser_ref):
    return winner + 0.0 * loser


def mean(winner, loser, winner_ref, loser_ref):
    return dpo(winner, loser, winner_ref, loser_ref).mean()


def detached(winner, loser, winner_ref, loser_ref):
    return dpo(winner, loser, winner_ref, loser_ref).detach()


def wrong(winner, loser, winner_ref, loser_ref):
    raise KeyError("no such thing")
