"""GenEval with models of transformers: Mask2Former finds things, CLIP tells their colours, the rules decide.

    confidence = p(class) mean of sigmoid(mask) over the mask
    colour     = argmax over ten colours of cos(image of the masked crop, mean of three texts)

Detections are made as mmdet makes them, which the official evaluation uses: the surest (query, class)
couples, masks at the size of the image, boxes around masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from diffexpo.errors import MissingError, RewardError
from diffexpo.phases import phase
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.dual_encoder import NetworkReward, model_files
from diffexpo.rewards.geneval_rules import COLOURS, NAMES, THRESHOLD, Detection, is_right, read_check
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.weights import LOAD_ERRORS, MODEL_FILES, check_keys, find_folder, fingerprint, read_part

BACKGROUND = (153, 153, 153)
"""What is laid over all but the thing whose colour is asked for (#999)."""
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TEXTS = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


@dataclass(frozen=True)
class Found:
    """A detection with its mask (H,W) of booleans."""

    detection: Detection
    mask: np.ndarray


def detections(class_logits: Tensor, mask_logits: Tensor, height: int, width: int) -> list[Found]:
    """What a Mask2Former finds in one image.

    Args:
        class_logits: (Q, 81) of its queries, the last one "nothing".
        mask_logits: (Q, h, w), of the image without the padding that it was given.
        height, width: Of the image.
    Returns:
        The surest Q couples of query and class above GenEval's lower threshold, with a mask of one pixel or
        more; boxes end one pixel beyond the mask.
    """
    scores = class_logits.softmax(dim=-1)[:, :-1]
    count, classes = scores.shape
    best, places = scores.flatten().topk(min(count, scores.numel()))
    whole = F.interpolate(mask_logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    found = []
    for score, place in zip(best.tolist(), places.tolist(), strict=True):
        logits = whole[place // classes]
        mask = (logits > 0).cpu().numpy()
        if not mask.any():
            continue
        confidence = score * float(logits[logits > 0].sigmoid().mean())
        if confidence > THRESHOLD:
            down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = float(across[0]), float(down[0]), float(across[-1] + 1), float(down[-1] + 1)
            found.append(Found(Detection(NAMES[place % classes], confidence, box), mask))
    return found


class GenEvalReward(NetworkReward):
    """1 where an image (B,3,H,W) is right by GenEval's rules, else 0.

    Raises:
        MissingError: a model or its image processor is missing.
        RewardError: a detector of other classes, damaged files, or a prompt that is not of GenEval's.
    """

    scale = "1 right, 0 wrong"

    def __init__(
        self,
        name: str,
        path: str,
        device: torch.device | str = "cpu",
        *,
        base: str,
        precision: str = "float32",
    ) -> None:
        super().__init__(name, texts=None)
        folder = find_folder(name, path, "a Mask2Former folder or a hub id", key="path", patterns=MODEL_FILES)
        files = model_files(name, folder)
        if not any((folder / file).is_file() for file in PROCESSOR):
            raise MissingError(
                f"reward {name!r}: {folder / PROCESSOR[0]} is missing; save it next to the model"
            )
        self._prepare = read_part(name, folder, Mask2FormerImageProcessorPil)
        self._network = _load(name, folder).to(device).eval().requires_grad_(False)
        self._clip = ClipReward(name, base, device, scale="raw", precision=precision)
        self.version = fingerprint(files, (folder,), clip=self._clip.version)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        checks = [read_check(prompt) for prompt in prompts]
        right = []
        for pixels, check in zip(to_bytes(images), checks, strict=True):
            found = self.find(pixels)
            coloured = {clause.name for clause in check.include if clause.colour}
            told = [
                replace(one.detection, colour=self.colour(pixels, one))
                if one.detection.name in coloured
                else one.detection
                for one in found
            ]
            right.append(is_right(told, check))
        return torch.tensor(right, dtype=torch.float32)

    @phase("scoring images")
    @torch.no_grad()
    def find(self, pixels: np.ndarray) -> list[Found]:
        """What is in an image (H,W,3) uint8. Images run alone, so that none depends on another."""
        given = self._prepare(images=[Image.fromarray(pixels)], return_tensors="pt")
        device = self._network.device
        told = self._network(
            pixel_values=given.pixel_values.to(device), pixel_mask=given.pixel_mask.to(device)
        )
        masks = told.masks_queries_logits[0].float()
        # The padding is at the right and at the bottom.
        inside, (rows, columns) = given.pixel_mask[0].bool(), given.pixel_mask.shape[-2:]
        high = round(masks.shape[1] * int(inside.any(dim=1).sum()) / rows)
        wide = round(masks.shape[2] * int(inside.any(dim=0).sum()) / columns)
        return detections(told.class_queries_logits[0].float(), masks[:, :high, :wide], *pixels.shape[:2])

    def colour(self, pixels: np.ndarray, one: Found) -> str:
        """The likeliest of the ten colours of a detected thing."""
        seen = np.where(one.mask[..., None], pixels, np.array(BACKGROUND, np.uint8))
        left, top, right, bottom = (int(edge) for edge in one.detection.box)
        crop = torch.from_numpy(seen[top:bottom, left:right].transpose(2, 0, 1)[None].copy()).float() / 255
        texts = [text.format(colour=colour, name=one.detection.name) for colour in COLOURS for text in TEXTS]
        vectors = self._clip.embed_prompts(texts).reshape(len(COLOURS), len(TEXTS), -1).mean(dim=1)
        likeness = F.normalize(vectors, dim=-1) @ self._clip.embed_images(crop)[0]
        return COLOURS[int(likeness.argmax())]


def _load(name: str, folder: object) -> Mask2FormerForUniversalSegmentation:
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        network, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            str(folder), dtype=torch.float32, **options
        )
    except LOAD_ERRORS as error:
        raise RewardError(f"reward {name!r}: {folder} cannot be loaded as a Mask2Former ({error})") from error
    wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    check_keys(name, folder, wrong, (), "Mask2Former")
    if network.config.num_labels != len(NAMES):
        raise RewardError(
            f"reward {name!r}: {folder} knows {network.config.num_labels} classes; expected the {len(NAMES)} "
            "of COCO instances"
        )
    return network
