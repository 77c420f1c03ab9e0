"""What the hub may answer, given by a server of our own: each refusal says what it means and what to do."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from diffexpo.errors import MissingError
from diffexpo.policies.loading import download_patterns, resolve_folder

# Model -> the hub's status and its code for the reason.
ANSWERS = {
    "owner/gated": (403, "GatedRepo"),
    "owner/absent": (401, "RepoNotFound"),
    "owner/other": (404, "RevisionNotFound"),
    "owner/broken": (400, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Refuses every model in its own way."""

    def do_GET(self) -> None:
        name = next((name for name in ANSWERS if name in self.path), "owner/broken")
        status, code = ANSWERS[name]
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("owner/gated", "'owner/gated': a gated model.*accept its licence on https://huggingface.co/owner/gated.*hf auth login"),
        ("owner/absent", "'owner/absent': not a local folder, and the hub has no such model.*spelling.*private"),
        ("owner/other", "model.revision='v9': 'owner/other' has no such branch, tag or commit"),
        ("owner/broken", "'owner/broken': not a local folder, and the hub did not give it"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do(hub: None, name: str, match: str) -> None:
    with pytest.raises(MissingError, match=match):
        resolve_folder(name, revision="v9")


FILES = (
    "model_index.json",
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/model.onnx",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "safety_checker/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer_3/spiece.model",
)


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        (None, {"unet/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"}),
        ("fp16", {"unet/diffusion_pytorch_model.fp16.safetensors"}),
    ],
)  # fmt: skip
def test_only_what_is_read_is_downloaded(variant: str | None, weights: set[str]) -> None:
    allowed, ignored = download_patterns(variant)
    fetched = {
        file
        for file in FILES
        if any(fnmatch(file, pattern) for pattern in allowed)
        and not any(fnmatch(file, pattern) for pattern in ignored)
    }
    assert fetched == weights | {
        "model_index.json",
        "unet/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer_3/spiece.model",
    }
