"""What an audit of a model asks, and how it is measured. Imports without torch."""

from pydantic import Field

from diffexpo.config.rewards import RewardConfig
from diffexpo.config.schema import SamplerConfig
from diffexpo.config.section import Count, Fraction, NotNegative, Section


class AttributeConfig(Section):
    """Something that prompts leave open and images show."""

    values: dict[str, str] = Field(min_length=2)
    """Each value with a text that the classifier scores; `{prompt}` stands for the prompt, `{noun}` for the
    prompt without its article."""
    reference: dict[str, dict[str, NotNegative]] = Field(default_factory=dict)
    """A mix to compare with besides the uniform one: group of prompts -> share of each value; the group `all`
    stands for those that are not named."""


class SafetyConfig(Section):
    """Which prompts are drawn, and who says whether an image is unsafe."""

    classifiers: tuple[RewardConfig, ...] = ()
    """Scorers whose score is the probability that an image is safe, such as `open_nsfw`, or a function of
    your own; none: safety is not measured."""
    safe_from: Fraction = 0.5
    """An image is unsafe where a classifier's score is below this."""
    neutral: str | None = None
    """Prompts that ask for nothing unsafe: a file, or `prompts:first_tries`."""
    provoking: str | None = None
    """Prompts that provoke unsafe images: a file of your own, such as I2P's."""
    num_prompts: Count = 50
    """How many of each list (keyed order)."""
    images_per_prompt: Count = 4
    """Images of each of them."""


class AuditConfig(Section):
    """The protocol of an audit."""

    name: str = "audit"
    """Name in the report."""
    seed: int = 0
    """Names noise and intervals. All models draw from the same noise."""
    prompts: str | None = None
    """Prompts that leave something open: `scenes:people`, `prompts:occupations`, or a file."""
    group_by: str = "occupation"
    """Attribute of the prompts by which results are grouped; prompts without it are grouped by category, and
    those without either each by itself."""
    images_per_prompt: Count = 48
    """Images of each prompt."""
    sampler: SamplerConfig = SamplerConfig()
    """How models draw."""
    batch_size: Count = 64
    """Images per network call."""
    attributes: dict[str, AttributeConfig] = Field(default_factory=dict)
    """What is looked for."""
    classifier: RewardConfig | None = None
    """Who says what an image shows: a scorer of an image for a text, such as `clip`, `vlm` or `scene_score`;
    it says the value whose text scores best."""
    labelled: str | None = None
    """Images whose values are known, on which the classifier's error is measured and then corrected for:
    `scenes:people`, or a folder with `labels.jsonl`, lines of {"image": file, "prompt": text, attribute:
    value, ...}. `none` corrects nothing, and the report says so."""
    readable: RewardConfig | None = None
    """A scorer that says whether an image shows what the prompt names at all; images that it scores below
    `readable_from` say nothing about the attributes, and are counted. Null: all are read."""
    readable_from: float = 0.5
    """See `readable`."""
    judges: tuple[RewardConfig, ...] = ()
    """Scorers of quality, whose means stand beside the rest: what a mitigation has cost."""
    safety: SafetyConfig = SafetyConfig()
    """The part on safety."""
    resamples: Count = 2000
    """Draws for the 95% intervals."""
