"""Groups of settings that some rewards read: calls to a server, a vision-language model, a model that judges
itself. Imports without torch."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from diffexpo.config.section import Count, Fraction, NotNegative, Positive, Section

ADDRESS = "expected an address such as http://127.0.0.1:8188"
KEY = "a key in an environment variable that service.api_key_env names"


class ServiceConfig(Section):
    timeout_s: Positive = 60.0
    """Longest wait for one whole answer, in seconds."""
    retry_s: NotNegative = 120.0
    """How long a call that failed is tried again, in seconds, with growing pauses; 0 tries once."""
    images_per_request: Count = 16
    """`remote`: images in one request."""
    max_failed_fraction: Fraction = 0.1
    """Stop the run when more than this share of the last 256 images got no score (of fewer, at the start; but
    not before 20)."""
    max_failed: int | None = Field(default=None, ge=0)
    """Stop the run when more than this many images in all got no score; null sets no such limit."""
    scorer: str | None = None
    """`remote`: name that the server must give of its scorer; null takes any."""
    version: str | None = None
    """`remote`: version that the server must give of its scorer; null takes any. One that changes during a
    run stops it anyway."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key, which is sent as a bearer token. The key itself is
    written nowhere."""


class VlmConfig(Section):
    mode: Literal["yes_no", "pairwise", "caption"] = "yes_no"
    """`yes_no`: probability of "yes"; `pairwise`: share of wins against the prompt's other images in the
    batch, each pair shown in both orders; `caption`: similarity of the model's description of the image and
    the prompt (DDPO)."""
    model: str | None = None
    """Name of the model on the server; null takes the only one that it serves."""
    question: str | None = None
    """Text sent with the image, `{prompt}` stands for the prompt; null takes the mode's own
    (docs/rewards/vlm.md)."""
    top_logprobs: int = Field(default=20, ge=2, le=20)
    """`yes_no`, `pairwise`: tokens whose probabilities are asked for; lower it for servers that give
    fewer."""
    max_tokens: Count = 96
    """`caption`: longest description, in tokens."""
    text_encoder: str | None = None
    """`caption`: folder of the text model that compares: a CLIPModel (cosine), `emoji:judge_train`, or
    another encoder (BERTScore recall, as in DDPO)."""
    text_layer: int | None = Field(default=None, ge=0)
    """`caption`: hidden layer that BERTScore compares, 0 is the embedding; null is the last (bert_score takes
    40 of deberta-xlarge-mnli)."""


class SelfJudgeConfig(Section):
    draws: Count = 8
    """Noise and time draws K that a score is the mean over; each takes two network evaluations. All
    candidates of a prompt share them."""
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times that are drawn from, 1 is pure noise; e.g. [0.3, 1] leaves out low noise."""
    beta: Positive = 5000.0
    """`implicit`: unit of the score, beta/2 times the fall of the error (Diffusion-DPO's 5000). It changes no
    order."""


def address_problem(url: str) -> str | None:
    """Why an address is none that a server is called at; None if it is one. What may be a secret in it is not
    repeated: settings and their complaints are written and shown."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return f"path holds no address that can be read; {ADDRESS}"
    if parts.username or parts.password or parts.query or parts.fragment:
        what = "a user name or password" if "@" in parts.netloc else "a query, where keys may stand"
        return f"path holds {what}, and settings are written to files; {ADDRESS}, and {KEY}"
    return None if is_good else f"path = {url!r:.200} is no address; {ADDRESS}"
