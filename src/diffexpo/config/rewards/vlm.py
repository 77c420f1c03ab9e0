"""A vision-language model as a judge: card of `rewards/vlm.py`."""

from collections.abc import Callable, Iterator
from typing import Literal

from diffexpo.config.rewards.card import CalledCard, Run
from diffexpo.config.rewards.groupwise import group_problems
from diffexpo.config.worlds import world_of


class VlmCard(CalledCard):
    """Any OpenAI-compatible server with image input."""

    scorer = "VlmJudge"
    what = "a vision-language model's answer: yes or no, which of two, or a description"
    unit = "probability or share of wins, 0 to 1; similarity, up to 1"
    path_is = "http://host:port/v1 of an OpenAI-compatible server"
    source = "any server with image input (vLLM, SGLang, llama.cpp, a hosted one)"
    licence = "the model's own"
    groups = frozenset({"service", "vlm"})

    type: Literal["vlm"] = "vlm"

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """With what is asked; the text encoder of `caption` runs here."""
        encoder = self.vlm.text_encoder
        vlm = self.vlm.model_copy(update={"text_encoder": resolve(encoder)}) if encoder else self.vlm
        return super().arguments(resolve, device) | {"vlm": vlm, "device": device}

    @property
    def identity(self) -> tuple[str | None, ...]:
        """One address can serve several models."""
        return (*super().identity, self.vlm.model)

    @property
    def is_groupwise(self) -> bool:
        """Shares of wins compare the images of a prompt."""
        return self.vlm.mode == "pairwise"

    @property
    def why_uncached(self) -> str:
        """A share of wins belongs to its group."""
        if not self.is_groupwise:
            return ""
        return (
            " with vlm.mode = pairwise: a share of wins depends on the prompt's other images; remove cache, "
            "or use yes_no"
        )

    def uses(self) -> Iterator[tuple[str, str | None]]:
        """The comparison by description, and the model that only its user can cite."""
        if self.vlm.mode == "caption":
            yield " (compared by description)", "black2024ddpo"
            if self.vlm.text_encoder and not world_of(self.vlm.text_encoder):
                yield " (similarity of texts)", "zhang2020bertscore"
        yield from super().uses()

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        if self.vlm.mode == "caption" and not self.vlm.text_encoder:
            yield (
                "vlm.mode = caption with vlm.text_encoder = null: nothing compares description and prompt; "
                "name a text model"
            )
        if self.is_groupwise:
            yield from group_problems(run, where, "vlm.mode = pairwise", "use vlm.mode=yes_no")
