"""Self-play pairs: an image of the data set wins against what the newest iterate drew for the same prompt.

    winner = a winner of D_off for the prompt, by key;   loser = each image drawn for it

No score decides, so no image is left out and the margin is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.online.pairing import PairingReport, Row
from diffexpo.rng import keyed_choice
from diffexpo.types import Prompt

SOURCE = "self_play"


def data_prompts(store: Store) -> list[Prompt]:
    """The prompts of D_off, one for each text."""
    rows = store.pairs(source="offline", columns=("prompt_id", "prompt"))
    texts = {str(row["prompt"]): str(row["prompt_id"]) for row in reversed(rows)}
    return [Prompt(number, text) for text, number in sorted(texts.items(), key=lambda item: item[1])]


def data_images(store: Store) -> dict[str, list[str]]:
    """Sample ids of D_off's winners by prompt, each once."""
    rows = store.pairs(source="offline", columns=("prompt", "winner_id"))
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(str(row["prompt"]), set()).add(str(row["winner_id"]))
    return {prompt: sorted(names) for prompt, names in found.items()}


def make_self_pairs(
    groups: Sequence[Sequence[Row]], images: Mapping[str, Sequence[str]], *, iteration: int, seed: int
) -> tuple[list[Row], PairingReport]:
    """Pair rows of one iteration, one for each image drawn.

    Args:
        groups: Sample rows of each request; all rows of a group share the prompt.
        images: `data_images`.
        iteration, seed: Names of the pair ids and of the choice among a prompt's data images.
    Returns:
        (pair rows, report).
    Raises:
        DataError: a prompt has no data image.
    """
    report = PairingReport(groups=len(groups))
    pairs: list[Row] = []
    for group, rows in enumerate(groups):
        names = images.get(str(rows[0]["prompt"]), ())
        if not names:
            raise DataError(
                f"self-play: prompt {rows[0]['prompt']!r} has no image among the winners of the offline "
                f"pairs; "
                "draw for their prompts"
            )
        for place, row in enumerate(rows):
            winner = names[keyed_choice(len(names), seed, iteration, "self-play", group, place)]
            pairs.append(_row(row, winner, f"pair-{iteration:04d}-{group:06d}-{place:02d}", iteration))
    report.kept = len(pairs)
    report.margins = [0.0] * len(pairs)
    report.winner_from = {"offline": len(pairs)}
    report.loser_from = {"exploration": len(pairs)}
    return pairs, report


def _row(row: Row, winner: str, name: str, iteration: int) -> Row:
    return {
        "pair_id": name,
        "iteration": iteration,
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "winner_id": winner,
        "loser_id": row["sample_id"],
        "judge": "data",
        "margin": 0.0,
        "source": SOURCE,
        "winner_agent": "offline",
        "loser_agent": row["agent"],
        "explored_id": None,
        "main_id": None,
        "uncertainty_winner": None,
        "uncertainty_loser": None,
    }
