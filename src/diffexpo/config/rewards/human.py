"""People who compare what a run drew: card of `rewards/human.py`."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from diffexpo.config.people import Asking, Question, RatingConfig, majority_right, votes_for
from diffexpo.config.rewards.card import RewardCard, Run
from diffexpo.config.section import Count, Fraction

EXAMPLE, CERTAIN = 0.75, 0.95
"""A pair that three of four people would decide alike, and a certainty, for the plan."""


class HumanCard(RewardCard):
    """Answers of people to one question on two images of a prompt."""

    scorer = "HumanVotes"
    what = "people say which of two images of a prompt is better (`diffexpo label`)"
    unit = "votes for an image against another; no image has a score of its own"
    source = "people"
    asks_people: ClassVar[bool] = True
    never_cached = "gives no scores"
    why_unverified = "asks people, who compare what a run drew; it is used in a run"

    type: Literal["human"] = "human"
    name: str = "people"
    """Name in metrics and reports; unique within the run."""
    question: Question = "quality"
    """`human`: what people are asked: which image is better, fits the prompt better, or is more beautiful."""
    votes: Count = 3
    """`human`: answers that each pair gets."""
    share: Fraction = 1.0
    """`human`: share of a collection's prompts that people judge, by keyed choice; other rewards with `role:
    train` rank the rest."""
    couples: Literal["random", "extremes", "disputed", "tournament"] = "random"
    """`human`: which images of a prompt people see: two by keyed choice, one of each agent where there are
    two (`random`); those that the other rewards rank best and worst (`extremes`); the two whose order two
    other rewards dispute most, on the prompts where they dispute most (`disputed`); or several, two at a
    time, those first that may still be the best (`tournament`)."""
    candidates: int = Field(default=4, ge=3)
    """`human`: images of a prompt in a `tournament`."""
    rounds: Count = 3
    """`human`: couples of a prompt that a `tournament` asks, one after another; the run waits for the votes
    of each round."""
    min_agreement: Fraction = 0.5
    """`human`: a pair is learned from if at least this share of its answers prefers the winner, and more of
    them than prefer the loser; others are counted and left out. Kept pairs weigh alike."""
    rating: RatingConfig = RatingConfig()
    """`human`: attention checks, repeats, conditions, and whose answers are left out."""

    def uses(self) -> Iterator[tuple[str, str | None]]:
        """No published work."""
        return iter(())

    @property
    def asking(self) -> Asking:
        """These settings."""
        given = (self.question, self.votes, self.share, self.couples, self.min_agreement, self.rating)
        return Asking(*given, self.candidates, self.rounds) if self._is_tournament else Asking(*given)

    @property
    def _is_tournament(self) -> bool:
        return self.couples == "tournament"

    def plan(self, prompts: int) -> str:
        """What people are asked of a collection, in words."""
        asked = self.asking.num_prompts(prompts)
        rest = f"; the other {prompts - asked} prompts by rewards" if asked < prompts else ""
        rounds, turns = self.asking.rounds, f" x {self.rounds} rounds" if self._is_tournament else ""
        total = f"{asked} pairs{turns} x {self.votes} votes by people: {asked * rounds * self.votes} votes"
        return f"{total}; the run waits for them{rest}; {self._certainty()}"

    def _certainty(self) -> str:
        """What the votes on a pair are worth, and how many would be worth more."""
        right, wanted = majority_right(self.votes, EXAMPLE), votes_for(CERTAIN, EXAMPLE)
        return (
            f"of {self.votes} on a pair that {EXAMPLE:.0%} of people would decide alike, most are right in "
            f"{right:.0%} of cases, of {wanted} in {CERTAIN:.0%} (`diffexpo label cost`)"
        )

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        if not where.startswith("rewards."):
            yield "type = human: people compare what a run learns from; it can stand in rewards only"
            return
        method, others = run.algorithm, [reward for reward in run.rewards if reward is not self]
        trained = [reward for reward in others if reward.role == "train" and not reward.asks_people]
        if self.role != "train":
            yield "role = watch: people are asked for pairs to learn from; remove role"
        if self.weight != 1:
            yield f"weight = {self.weight:g}: votes are not mixed with scores; remove weight"
        if any(reward.asks_people for reward in others):
            yield "type = human stands twice: pairs are made from the answers to one question; remove one"
        if not (method.is_ranked and method.has_pairs) or method.draws_first:
            yield (
                f"type = human with algorithm.type = {method.type}: people give pairs of images, and this "
                "method does not learn from pairs of an earlier collection that rewards rank; use expo or "
                "diffusion_dpo"
            )
        elif not method.collects(run):
            yield f"type = human with explore.iterations = {run.explore.iterations}: nothing is drawn"
        elif method.needs_uncertainty:
            yield "type = human: the offset by uncertainty is a spread of scores, which votes have not"
        if run.baseline.contenders:
            yield (
                "type = human with baseline.contenders: each would ask people for votes of its own; leave "
                "it empty, and compare finished runs by `diffexpo study`"
            )
        if self.asking.num_prompts(run.explore.prompts_per_iteration) == 0:
            yield f"share = {self.share:g}: people would be asked nothing; raise it, or remove this reward"
        if self._is_tournament and self.candidates > method.images_of_prompt(run):
            yield (
                f"candidates = {self.candidates}: a prompt has {method.images_of_prompt(run)} images; ask "
                "for that many at most, or draw more"
            )
        if self.couples == "disputed" and len(trained) < 2:
            yield (
                f"couples = disputed: two other rewards with role: train must dispute, there are "
                f"{len(trained)}; add some"
            )
        elif (self.share < 1 or self.couples == "extremes") and not trained:
            need = "rank the other prompts" if self.share < 1 else "choose the couples"
            settings = f"share = {self.share:g}, couples = {self.couples}"
            yield f"{settings}: another reward with role: train must {need}; add one"
        if self.share == 1 and self.couples in ("random", "tournament") and trained:
            yield (
                f"share = 1: people judge every prompt, so {trained[0].name!r} would rank nothing; give it "
                "role: watch, or set share below 1"
            )
