"""Self-play pairs: an image of the data set wins against what the newest iterate drew for the same prompt.

    winner = a winner of D_off for the prompt, by key;   loser = each image drawn for it

No score decides, so no image is left out and the margin is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffexpo.data.rows import Preference, Sample
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.online.pairing import Paired, pair_against
from diffexpo.rng import keyed_choice
from diffexpo.types import Prompt


def data_prompts(store: Store) -> list[Prompt]:
    """The prompts of D_off, one for each text."""
    texts: dict[str, str] = {}
    for pairs in store.parts("pairs", Preference, "offline"):
        for pair in pairs:
            texts.setdefault(pair.prompt, pair.prompt_id)
    return [Prompt(number, text) for text, number in sorted(texts.items(), key=lambda item: item[1])]


def data_images(store: Store) -> dict[str, list[str]]:
    """Sample ids of D_off's winners by prompt, each once."""
    found: dict[str, set[str]] = {}
    for pairs in store.parts("pairs", Preference, "offline"):
        for pair in pairs:
            found.setdefault(pair.prompt, set()).add(pair.winner_id)
    return {prompt: sorted(names) for prompt, names in found.items()}


def make_self_pairs(
    groups: Sequence[Sequence[Sample]], images: Mapping[str, Sequence[str]], *, iteration: int, seed: int
) -> Paired:
    """Pairs of one iteration, one for each image drawn; which of `images` (`data_images`) wins is keyed.

    Raises:
        DataError: a prompt has no data image.
    """
    paired = Paired(groups=len(groups))
    for group, samples in enumerate(groups):
        names = images.get(samples[0].prompt, ())
        if not names:
            raise DataError(
                f"self-play: prompt {samples[0].prompt!r} has no image among the winners of the offline "
                "pairs; draw for their prompts"
            )
        for place, sample in enumerate(samples):
            winner = names[keyed_choice(len(names), seed, iteration, "self-play", group, place)]
            pair = pair_against(
                sample,
                iteration,
                f"{group:06d}-{place:02d}",
                winner_id=winner,
                winner_agent="offline",
                judge="data",
                margin=0.0,
                source="self_play",
            )
            paired.pairs.append(pair)
    return paired
