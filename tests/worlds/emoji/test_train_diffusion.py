"""The weights of the noise-prediction error."""

from __future__ import annotations

import torch

from worlds.emoji.train_diffusion import min_snr_weight


def test_min_snr_weight_is_one_for_noisy_times_and_caps_clean_ones() -> None:
    alpha_bar = torch.tensor([1 / 11, 0.5, 10 / 11], dtype=torch.float64)  # SNR 0.1, 1, 10
    torch.testing.assert_close(min_snr_weight(alpha_bar), torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
