r"""Balance over the images of a prompt, as a reward of each of them.

    m_k = (u_k + sum_{i in group} p_i(k)) / (n + 1)
    r_i = - sum_k p_i(k) log(m_k / u_k)

p_i(k) is the probability that image i shows value k, u the shares that are wanted, and m those of the
prompt's n images and one more that is drawn from u. r_i is, up to a constant, minus the slope of n KL(m || u)
in image i's weight: what its prompt's images have too much of is worth less than nothing, what they lack is
worth more. Images of one prompt that all show the same are worth the same, and teach nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffexpo.rewards.classifier import value_probabilities
from diffexpo.types import Reward


def balance_rewards(probabilities: Tensor, target: Tensor) -> Tensor:
    """Rewards of one prompt's images (module's formula).

    Args:
        probabilities: p (n, K), rows summing to 1.
        target: u (K,), > 0, summing to 1.
    Returns:
        (n,). Three images that show the first of two values and one that shows the second, with u = (1/2,
        1/2): -log 1.4 = -0.336 thrice, and -log 0.6 = 0.511.
    Source: the EXPO paper asks for rewards that lessen bias without naming one; this is ours.
    """
    mix = (target + probabilities.sum(dim=0)) / (len(probabilities) + 1)
    return -(probabilities * torch.log(mix / target)).sum(dim=1)


class BalanceReward:
    """`balance_rewards` of the images of each prompt that are scored together; NaN for an image alone.

    `by` scores an image for a text, `values` has a text for each value, `target` the share that is wanted of
    each (None: all alike), `temperature` is that of the probabilities.
    """

    scale = "nats"
    is_groupwise = True

    def __init__(
        self,
        name: str,
        by: Reward,
        values: Mapping[str, str],
        target: Mapping[str, float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.name, self._by, self._values, self._temperature = name, by, values, temperature
        shares = {value: 1 / len(values) for value in values} if target is None else target
        self._target = torch.tensor([shares[value] for value in values], dtype=torch.float64)
        facts = json.dumps([dict(values), self._target.tolist(), temperature])
        self.version = f"{by.version} balanced {hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), NaN for images that are alone or cannot be read; RewardError from the other reward."""
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        scores = torch.full((len(prompts),), torch.nan)
        for prompt, rows in groups.items():
            if len(rows) < 2:
                continue
            found = value_probabilities(
                self._by, self._values, images[rows], [prompt] * len(rows), self._temperature
            ).double()
            is_read = torch.isfinite(found).all(dim=1)
            kept = torch.tensor(rows)[is_read]
            if len(kept) > 1:
                scores[kept] = balance_rewards(found[is_read], self._target).float()
        return scores
