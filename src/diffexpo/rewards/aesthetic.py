"""LAION's aesthetic predictors: one linear map (v1) or a stack (v2) on a CLIP image vector of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from diffexpo.config.rewards.aesthetic import AestheticCard
from diffexpo.errors import RewardError
from diffexpo.rewards.dual_encoder import DualEncoder, model_files, read_clip_model, read_processor
from diffexpo.rewards.heads import STACK, apply_stack, read_stack
from diffexpo.rewards.weights import MODEL_FILES, Device, find_folder, find_weights, fingerprint, read_tensors


class AestheticReward(DualEncoder):
    """head(image / |image|), a rating of about 1 to 10; prompts are not read.

    `path` is the head as safetensors: `weight`, `bias` (v1) or `layers.{0,2,4,6,7}.weight|bias` (v2); `base`
    is the CLIPModel folder or hub id that the head was trained on (v2: OpenAI CLIP ViT-L/14).

    Raises:
        MissingError: head or model are missing.
        RewardError: the file is damaged, or its head is another one or does not fit the model's vectors.
    Source: LAION aesthetic predictor v1 and v2 ("improved aesthetic predictor"), their inference code.
        Images go through the image processor of the CLIP folder; where the longer side is cropped by an odd
        number of pixels the official v2 script may crop one pixel further.
    """

    def __init__(
        self, name: str, path: str | None, device: Device = "cpu", *, base: str, precision: str = "float32"
    ) -> None:
        file = find_weights(name, AestheticCard, path)
        head = read_head(name, file)
        self.scale = f"rating, about 1 to 10 (v{2 if len(head) > 1 else 1})"
        folder = find_folder(name, base, AestheticCard.base_is, patterns=MODEL_FILES)
        files = [file, *model_files(name, folder)]
        prepare, model = read_processor(name, folder), read_clip_model(name, folder)
        width, own = head[0][0].shape[1], int(model.config.projection_dim)
        if width != own:
            raise RewardError(
                f"reward {name!r}: {file} reads vectors of length {width}, but the image vectors of "
                f"base={base!r} have length {own}; name the CLIP model that the head was trained on"
            )
        super().__init__(name, model, None, prepare, device=device, precision=precision)
        self._head = [(weight.to(device), bias.to(device)) for weight, bias in head]
        self.version = fingerprint(files, [folder], precision=precision)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return apply_stack(self.embed_images(images), self._head)


def read_head(name: str, file: Path) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of every map of a head; RewardError if the tensors are neither v1's nor v2's."""
    tensors = read_tensors(name, file)
    v2 = {f"layers.{place}.{kind}" for place in STACK for kind in ("weight", "bias")}
    if tensors.keys() == {"weight", "bias"}:
        head = [(tensors["weight"].float(), tensors["bias"].float())]
    elif tensors.keys() == v2:
        head = read_stack(tensors, "layers.")
    else:
        raise RewardError(
            f"reward {name!r}: {file} holds {', '.join(sorted(tensors)[:4])}, ...; expected weight and "
            f"bias (v1) or layers.{{0,2,4,6,7}}.weight and bias (v2, sac+logos+ava1-l14-linearMSE); the ReLU "
            "head is another model"
        )
    if head[-1][0].shape[0] != 1 or any(a[0].shape[0] != b[0].shape[1] for a, b in pairwise(head)):
        raise RewardError(f"reward {name!r}: the maps of {file} do not follow one another to one number")
    return head
