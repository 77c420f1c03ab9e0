"""Scores by the official code of a reward model, for `diffexpo rewards verify --against`.

    diffexpo rewards verify pickscore --pictures pictures/
    python examples/official_scores.py pickscore pictures/ official.json
    diffexpo rewards verify pickscore --against official.json

Runs in any environment that has the official package; diffexpo need not be there. `pickscore` is the use that
its model card describes and needs transformers alone; `--path` and `--base` name local folders. `hpsv2` and
`hpsv2.1` need the package hpsv2, `imagereward` the package image-reward; both fetch their own weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

Pairs = list[tuple[Path, str]]


def pickscore(pairs: Pairs, path: str | None, base: str | None) -> list[float]:
    """Cosine of picture and prompt times the logit scale."""
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(base or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    model = AutoModel.from_pretrained(path or "yuvalkirstain/PickScore_v1").eval()
    longest = model.config.text_config.max_position_embeddings  # 77
    scores = []
    for file, prompt in pairs:
        pixels = processor(images=Image.open(file), return_tensors="pt")
        tokens = processor(
            text=prompt, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.no_grad():
            found = (model.get_image_features(**pixels), model.get_text_features(**tokens))
            # transformers 5 wraps the features
            image, text = (getattr(each, "pooler_output", each) for each in found)
            cosine = torch.nn.functional.cosine_similarity(image, text)
            scores.append(float(model.logit_scale.exp() * cosine))
    return scores


def hps(version: str) -> Callable[[Pairs, str | None, str | None], list[float]]:
    """100 x cosine: the package returns the cosine, its benchmark prints 100 times that."""

    def score(pairs: Pairs, path: str | None, base: str | None) -> list[float]:
        import hpsv2

        return [100 * float(hpsv2.score(str(file), prompt, hps_version=version)[0]) for file, prompt in pairs]

    return score


def imagereward(pairs: Pairs, path: str | None, base: str | None) -> list[float]:
    """The standardised reward."""
    import ImageReward

    model = ImageReward.load(path or "ImageReward-v1.0")
    return [float(model.score(prompt, str(file))) for file, prompt in pairs]


SCORERS = {"pickscore": pickscore, "hpsv2": hps("v2.0"), "hpsv2.1": hps("v2.1"), "imagereward": imagereward}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("type", choices=SCORERS)
    parser.add_argument("pictures", type=Path, help="folder that `rewards verify --pictures` has written")
    parser.add_argument("out", type=Path, help="JSON file for `rewards verify --against`")
    parser.add_argument("--path", help="weights, instead of the official download")
    parser.add_argument("--base", help="processor of pickscore")
    options = parser.parse_args()
    listed = json.loads((options.pictures / "prompts.json").read_text(encoding="utf-8"))
    pairs = [(options.pictures / f"{picture['name']}.png", picture["prompt"]) for picture in listed]
    scores = SCORERS[options.type](pairs, options.path, options.base)
    named = {picture["name"]: score for picture, score in zip(listed, scores, strict=True)}
    found = {"scorers": [{"type": options.type, "scores": named}]}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(scores)} scores of {options.type} in {options.out}")


if __name__ == "__main__":
    main()
