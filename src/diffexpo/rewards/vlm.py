r"""A vision-language model as a judge, through any OpenAI-compatible server.

    yes_no:    p(yes) / (p(yes) + p(no))                           of the first token of the answer
    pairwise:  mean over j of P(i beats j),  P(i beats j) = [p(first | i, j) + p(second | j, i)] / 2
    caption:   similarity(description of the image, prompt)      (DDPO, arXiv 2305.13301, section 5)

An answer that names neither choice, a description that is empty or a call that fails gives no score: NaN,
counted, never 0.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffexpo.config.rewards import ServiceConfig, VlmConfig
from diffexpo.errors import ConfigError, MissingError, ScorerStoppedError
from diffexpo.rewards.calling import CalledReward, CallFailedError, map_concurrently
from diffexpo.rewards.text_similarity import TextSimilarity

_log = logging.getLogger("diffexpo")
QUESTIONS = {
    "yes_no": 'Does this picture show "{prompt}"? Answer with yes or no only.',
    "pairwise": 'Which of the two pictures shows "{prompt}" better, and looks better? '
    "Answer with 1 for the first or 2 for the second only.",
    "caption": "What is going on in this image? Answer in one short sentence.",
}
CHOICES = {"yes_no": ("yes", "no"), "pairwise": ("1", "2")}
FAIR_SHARE, ROUNDING = 0.1, 1e-3
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "temperature": ""}
"""What some servers call a setting of a request; "": it is left out."""
# Marks of a word's beginning in the vocabularies of tokenizers, and what models put around a word.
_AROUND = " \t\r\n\u2581\u0120\u010a\"'`*.,:;!()[]"


def choice_probability(top_logprobs: Sequence[Mapping[str, object]], choices: tuple[str, str]) -> float:
    """Probability of the first of two answers, given that the answer is one of the two.

        p(first) / (p(first) + p(second)),   p(choice) = sum of exp(logprob) over the tokens that spell it

    `top_logprobs` are the likeliest first tokens, each {"token": text, "logprob": number}; case, and spaces
    and punctuation around them, do not count. `choices` are in lower case. NaN if neither is among the
    tokens, or if together they hold less than `FAIR_SHARE` of the probability: then the model means to say
    something else first, such as a thought, and what is left for the choices is noise. Tokens "Yes" 0.6,
    " yes" 0.2 and "no" 0.2 give 0.8.

    Source: the form of VQAScore (arXiv 2404.01291, equation 1), with both answers normalised.
    """
    mass = dict.fromkeys(choices, 0.0)
    for entry in top_logprobs:
        token, logprob = entry.get("token"), entry.get("logprob")
        word = token.strip(_AROUND).casefold() if isinstance(token, str) else ""
        # JSON's false is an int too.
        # Rounding of a server's half precision can make the logarithm of 1 a little more than 0.
        if word in mass and isinstance(logprob, int | float) and logprob is not False and logprob <= ROUNDING:
            mass[word] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass[choices[0]] / total if total >= FAIR_SHARE else math.nan


def wins(first_shown: Tensor) -> Tensor:
    """Share of wins of each of n images, position of the image cancelled.

        P_ij = [F_ij + (1 - F_ji)] / 2,     w_i = mean over j != i of P_ij

    `first_shown` is F (n,n), F_ij the probability that i beats j when i is shown first; NaN where no answer
    came, and the diagonal is not read. Returns (n,) float64 in [0, 1], NaN where an image has no answered
    comparison; F = [[., 0.9], [0.3, .]] gives [0.8, 0.2].
    """
    both = (first_shown.double() + 1 - first_shown.double().T) / 2
    both = both.masked_fill(torch.eye(len(both), dtype=torch.bool), torch.nan)
    return both.nanmean(dim=1)


class VlmJudge(CalledReward):
    """Scores by what a vision-language model answers.

    `pairwise` compares images of one prompt within one call; an image that is the only one of its prompt gets
    NaN. Asking is deterministic as far as the server is (temperature 0, where it takes one). `url` is the
    server's base address up to and including `/v1`; the text encoder of `caption` runs on `device`.

    Raises:
        ConfigError: `url` is no address, or the question lacks a {prompt} that it needs.
        MissingError: nothing answers there, or the model, the key or the text encoder is missing.
    """

    def __init__(
        self,
        name: str,
        url: str,
        service: ServiceConfig | None = None,
        vlm: VlmConfig | None = None,
        concurrency: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(name, url, service, concurrency)
        self.num_compared = self.num_inconsistent = 0
        self._vlm = vlm = vlm or VlmConfig()
        self._question = QUESTIONS[vlm.mode] if vlm.question is None else vlm.question
        if vlm.mode != "caption" and "{prompt}" not in self._question:
            reason = f"vlm.question = {self._question!r} holds no {{prompt}}"
            raise ConfigError(f"reward {name!r}: {reason}; the model would not know what to look for")
        self._similarity = self._text_similarity(device) if vlm.mode == "caption" else None
        self._renamed: dict[str, str] = {}
        self._model = self._find_model()
        # Two servers need not mean the same by a model's name.
        asked = {key: str(getattr(vlm, key)) for key in ("top_logprobs", "max_tokens")}
        self.cache_facts = {"url": self.url, **asked}
        digest = hashlib.sha256(self._question.encode()).hexdigest()[:12]
        against = f" against {self._similarity.version}" if self._similarity else ""
        self.version = f"{self._model} {vlm.mode} question {digest}{against}"
        self.scale = {
            "yes_no": "probability of yes",
            "pairwise": "share of wins within the prompt",
            "caption": "similarity of description and prompt",
        }[vlm.mode]
        # Wins depend on the other images of the call: scores of one image may not be kept for another call.
        self.is_groupwise = vlm.mode == "pairwise"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts, NaN where none was obtained;
        ScorerStoppedError past the budget, or if the server gives no log-probabilities."""
        pngs = self._pngs(images, prompts)
        if self._vlm.mode == "pairwise":
            return self._score_groups(pngs, prompts)
        ask = self._probability if self._vlm.mode == "yes_no" else self._caption_score
        shown = [([png], prompt) for png, prompt in zip(pngs, prompts, strict=True)]
        scores = map_concurrently(lambda question: ask(*question), shown, self._concurrency)
        return torch.tensor(scores, dtype=torch.float32)

    def describe(self, png: str, prompt: str) -> str:
        """The model's description of an image (base64 PNG)."""
        message = self._ask([png], prompt, {"max_tokens": self._vlm.max_tokens}).get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise CallFailedError(f"the model described the image as {text!r}", can_retry=False)
        return text.strip()

    def _score_groups(self, pngs: Sequence[str], prompts: Sequence[str]) -> Tensor:
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        orders = [pair for rows in groups.values() for pair in itertools.permutations(rows, 2)]
        shown = [([pngs[row] for row in pair], prompts[pair[0]]) for pair in orders]
        answers = map_concurrently(lambda question: self._probability(*question), shown, self._concurrency)
        first_shown = torch.full((len(prompts), len(prompts)), torch.nan, dtype=torch.float64)
        for pair, answer in zip(orders, answers, strict=True):
            first_shown[pair] = answer
        self._count_inconsistent(first_shown)
        return wins(first_shown).float()

    def _count_inconsistent(self, first_shown: Tensor) -> None:
        """Pairs whose winner changes with the order."""
        upper = torch.triu(torch.isfinite(first_shown + first_shown.T), diagonal=1)
        forward, backward = first_shown[upper], first_shown.T[upper]
        changed = ((forward > 0.5) & (backward > 0.5)) | ((forward < 0.5) & (backward < 0.5))
        compared, inconsistent = len(forward), int(changed.sum())
        self.num_compared += compared
        self.num_inconsistent += inconsistent
        if 2 * inconsistent > compared:
            text = "reward %r: %d of %d comparisons name another winner when the images change places"
            _log.warning(text, self.name, inconsistent, compared)

    def _probability(self, pngs: Sequence[str], prompt: str) -> float:
        """Probability of the first choice."""
        choices = CHOICES[self._vlm.mode]

        def attempt() -> float:
            settings = {"max_tokens": 1, "logprobs": True, "top_logprobs": self._vlm.top_logprobs}
            value = choice_probability(self._first_token(self._ask(pngs, prompt, settings)), choices)
            if math.isnan(value):
                absent = f"neither {choices[0]} nor {choices[1]} is among the likeliest first tokens"
                advice = "a model that thinks before it answers needs thinking turned off"
                raise CallFailedError(f"{absent}; {advice}", can_retry=False)
            return value

        return self._counted(attempt)

    def _caption_score(self, pngs: Sequence[str], prompt: str) -> float:
        assert self._similarity is not None
        similarity = self._similarity
        return self._counted(lambda: similarity.compare(self.describe(pngs[0], prompt), prompt))

    def _counted(self, attempt: Callable[[], float]) -> float:
        """The result of an attempt that is repeated while that may help; NaN, counted, if all fail."""
        self.budget.check()
        try:
            value = self.persist(attempt)
        except CallFailedError as error:
            _log.warning("reward %r: %s; one image stays without this answer", self.name, error)
            self.budget.add(1, 1, str(error))
            return math.nan
        self.budget.add(1, 0)
        return value

    def _ask(self, pngs: Sequence[str], prompt: str, settings: Mapping[str, object]) -> dict[str, object]:
        """The first choice of the answer to one question about one or two images."""
        shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}} for png in pngs]
        text = {"type": "text", "text": self._question.replace("{prompt}", prompt)}
        messages = [{"role": "user", "content": [*shown, text]}]
        reply = self._chat({"model": self._model, "messages": messages, "temperature": 0, **settings})
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise CallFailedError("the answer holds no choices", can_retry=True)
        return choices[0]

    def _chat(self, asked: dict[str, object]) -> dict[str, object]:
        """The answer to a request; what a server refuses by name it is not sent again, as models that are
        served by others refuse `temperature`, or know `max_tokens` by another name."""
        while True:
            sent = {self._renamed.get(key, key): value for key, value in asked.items()}
            sent.pop("", None)
            try:
                return self.call("/chat/completions", sent)
            except CallFailedError as error:
                refused = next((key for key in OTHER_NAMES if key in sent and key in str(error)), None)
                if not error.is_refused_input or refused is None:
                    raise
                _log.warning("reward %r: %s; asked without %s from now on", self.name, error, refused)
                self._renamed[refused] = OTHER_NAMES[refused]

    def _first_token(self, choice: Mapping[str, object]) -> list[Mapping[str, object]]:
        """The likeliest first tokens of an answer."""
        logprobs = choice.get("logprobs")
        if logprobs is None:
            reason = f"{self._model!r} answers without log-probabilities"
            advice = "serve it with them (vLLM and SGLang give them), or use vlm.mode = caption"
            raise ScorerStoppedError(f"reward {self.name!r}: {reason}; {advice}")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        first = content[0] if isinstance(content, list) and content else None
        top = first.get("top_logprobs") if isinstance(first, dict) else None
        if not isinstance(top, list):
            raise CallFailedError("the answer holds no top_logprobs", can_retry=True)
        return [entry for entry in top if isinstance(entry, dict)]

    def _find_model(self) -> str:
        """The model asked for, or the only one there is."""
        expected = "an OpenAI-compatible server; its address ends in /v1"
        wanted = self._vlm.model
        try:
            models = self._first(lambda: self.call("/models"), expected).get("data")
        except ScorerStoppedError:  # it answers, but keeps no list
            if wanted is None:
                raise
            models = None
        entries = models if isinstance(models, list) else []
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        if wanted in names or (wanted is None and len(names) == 1):
            return str(names[0] if wanted is None else wanted)
        served = f"{self.url} serves {', '.join(map(str, names[:20])) or 'none'}"
        if wanted is None:
            raise MissingError(f"reward {self.name!r}: vlm.model = None; {served}")
        self._check_alias(wanted, served)
        return wanted

    def _check_alias(self, model: str, served: str) -> None:
        """Refuse a model that is not listed unless it answers: hosted ones have names of their own."""
        question = {"role": "user", "content": "Say yes."}
        asked = {"model": model, "messages": [question], "temperature": 0, "max_tokens": 1}
        try:
            self.persist(lambda: self._chat(asked))
        except (CallFailedError, ScorerStoppedError) as error:
            raise MissingError(
                f"reward {self.name!r}: vlm.model = {model!r}; {served}, and asked for it: {error}"
            ) from None

    def _text_similarity(self, device: torch.device | str) -> TextSimilarity:
        if self._vlm.text_encoder is None:
            raise ConfigError(
                f"reward {self.name!r}: vlm.mode = caption needs vlm.text_encoder, the folder of the text "
                "model that compares description and prompt (emoji:judge_train, or an encoder such as "
                "deberta-xlarge-mnli)"
            )
        return TextSimilarity(self.name, self._vlm.text_encoder, layer=self._vlm.text_layer, device=device)
