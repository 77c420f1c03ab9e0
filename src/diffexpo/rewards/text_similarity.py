r"""How well one text says what another does.

    BERTScore recall:  R = mean over tokens x_i of the reference of max over tokens y_j of the candidate of
        cos(x_i, y_j)

Recall, because a description may say more than the prompt asks for, but not less.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.weights import LOAD_ERRORS, Device, read_settings

# What DDPO compares the description with.
REFERENCE = "The image contains {prompt}"


def recall(candidate: Tensor, reference: Tensor) -> Tensor:
    """BERTScore recall of two texts given as token vectors.

        R = mean_i max_j cos(x_i, y_j)

    `candidate` is y (M,D), tokens of the text that is judged, and `reference` x (N,D), of what it should say.
    The scalar is 1 if every reference token occurs in the candidate, whatever else does.

    Raises:
        RewardError: one of the two has no token.
    Source: BERTScore (arXiv 1904.09675) equation 1, without idf weights and rescaling; DDPO uses its recall.
    """
    if len(candidate) == 0 or len(reference) == 0:
        reason = f"recall of {len(candidate)} candidate and {len(reference)} reference tokens"
        advice = "expected one of each at least"
        raise RewardError(f"{reason}; {advice}")
    x = reference / reference.norm(dim=-1, keepdim=True)
    y = candidate / candidate.norm(dim=-1, keepdim=True)
    return (x @ y.T).amax(dim=1).mean()


class TextSimilarity:
    """Similarity of a description and a prompt by a text model on disk.

    A CLIPModel folder gives the cosine of the two text vectors (of the plain prompt). Any other encoder gives
    BERTScore recall against "The image contains {prompt}", as in DDPO, without the tokens that the tokenizer
    adds. `layer` is the hidden layer that is compared, 0 is the embedding and None the last; CLIP does not
    use it. MissingError if there is no such folder, RewardError if it holds no text model.
    """

    def __init__(self, name: str, folder: str, *, layer: int | None = None, device: Device = "cpu") -> None:
        config = Path(folder).expanduser() / "config.json"
        if not config.is_file():
            reason = f"vlm.text_encoder = {folder!r} holds no config.json"
            raise MissingError(f"reward {name!r}: {reason}; expected the folder of a text model")
        self._layer = layer
        self._clip: ClipReward | None = None
        # Tokenizers keep state while they work, and several answers may arrive at once.
        self._lock = threading.Lock()
        if read_settings(name, config).get("model_type") == "clip":
            self._clip = ClipReward(name, folder, device)
            self.version = f"clip text {self._clip.version[:12]}"
            return
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(config.parent), local_files_only=True)
            options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
            model = AutoModel.from_pretrained(str(config.parent), **options)
        except LOAD_ERRORS as error:
            raise RewardError(
                f"reward {name!r}: vlm.text_encoder = {folder!r} cannot be loaded as a text model ({error})"
            ) from error
        self._model = model.to(device).eval().requires_grad_(False)
        depth = int(self._model.config.num_hidden_layers)
        if layer is not None and layer > depth:
            reason = f"vlm.text_layer = {layer}, but {folder!r} has {depth} layers"
            raise RewardError(f"reward {name!r}: {reason}; choose one of 0 to {depth}")
        used = depth if layer is None else layer
        self.version = f"{self._model.config.model_type} layer {used} of {config.parent.name}"

    def compare(self, description: str, prompt: str) -> float:
        """Similarity, at most 1."""
        with self._lock:
            if self._clip is not None:
                vectors = self._clip.embed_prompts([description, prompt])
                return float((vectors[0] * vectors[1]).sum())
            wanted = REFERENCE.replace("{prompt}", prompt)
            return float(recall(self._tokens(description), self._tokens(wanted)))

    def _tokens(self, text: str) -> Tensor:
        """Vectors (N,D) of the text's own tokens."""
        longest = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        inputs = self._tokenizer(
            text, truncation=True, max_length=longest, return_special_tokens_mask=True, return_tensors="pt"
        )
        own = inputs.pop("special_tokens_mask")[0] == 0
        with torch.no_grad():
            output = self._model(**inputs.to(self._model.device), output_hidden_states=True)
        return output.hidden_states[-1 if self._layer is None else self._layer][0][own.to(self._model.device)]
