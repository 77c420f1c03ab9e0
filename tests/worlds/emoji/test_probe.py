"""The shipped probe reads people it never saw."""

from __future__ import annotations

import torch

from diffexpo.worlds import emoji
from worlds.emoji.probe import load_probe, measure_probe, probe_rows


def test_the_probe_reads_real_people_it_never_saw() -> None:
    _, held = probe_rows()
    probe = load_probe()
    accuracy = measure_probe(probe, held, torch.from_numpy(emoji.load_images([row["id"] for row in held])))
    assert accuracy["skin_tone"] > 0.85 and accuracy["gender"] > 0.6
    read = probe.read(torch.rand(2, 3, 64, 64))
    assert read["gender"].shape == (2, 3) and read["skin_tone"].shape == (2, 6)
    torch.testing.assert_close(read["gender"].sum(-1), torch.ones(2))
