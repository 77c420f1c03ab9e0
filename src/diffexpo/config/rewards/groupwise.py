"""Rewards whose scores compare the images of a prompt: what a run must be like for that."""

from collections.abc import Iterator

from diffexpo.config.rewards.card import SCORING_BATCH, Run


def group_problems(run: Run, where: str, what: str, instead: str) -> Iterator[str]:
    """Why a batch would not hold all images of a prompt.

    Args:
        run, where: As in `RewardCard.problems`.
        what: The setting that compares images, as a sentence begins with it: "vlm.mode = pairwise".
        instead: What else there is to do, as the end of a sentence.
    """
    size, group = run.explore.batch_size, run.algorithm.images_of_prompt(run)
    if where.startswith("evaluation"):
        yield (
            f"{what}: evaluation compares versions of the model, but these scores compare images of one "
            f"version; {instead}"
        )
    elif run.algorithm.branches is not None:
        yield (
            f"{what} with algorithm.type = {run.algorithm.type}: it scores one candidate of each image at a "
            f"time; {instead}"
        )
    elif run.explore.agents == 2 and not run.algorithm.draws_first:
        yield (
            f"{what} with explore.agents = 2: each agent's images are scored apart, and such scores cannot "
            f"be compared; use explore.agents=1, or {instead}"
        )
    elif group > SCORING_BATCH:
        yield (
            f"{what} with {group} images of a prompt: at most {SCORING_BATCH} are compared at once; draw "
            "fewer"
        )
    elif size % group or (size > SCORING_BATCH and SCORING_BATCH % group):
        yield (
            f"{what} with explore.batch_size = {size} and {group} images of a prompt: a batch must hold "
            f"whole prompts; {SCORING_BATCH // group * group} does"
        )
