"""What is uploaded to the hub, told by a stand-in of its client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffexpo.errors import ConfigError, DiffexpoError, MissingError
from diffexpo.policies.publishing import push_folder


class Hub:
    """Keeps repositories in memory; `error` is raised at the upload."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.files, self.private = error, {}, {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        root = Path(folder_path)
        self.files[repo_id] = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1 {commit_message}")


def push(folder: Path, hub: Hub, repository: str = "me/my-lora", private: bool = True) -> str:
    return push_folder(folder, repository, private=private, title="mine", client=hub)


def test_the_folder_is_uploaded_whole_and_a_repository_stays_as_private_as_it_was(tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    hub = Hub()
    assert push(tmp_path, hub) == "https://hub/me/my-lora/commit/1 mine"
    assert hub.files == {"me/my-lora": {"pytorch_lora_weights.safetensors", "README.md"}}
    push(tmp_path, hub, private=False)
    assert hub.private == {"me/my-lora": True}


@pytest.mark.parametrize("name", ["mine", "a/b/c", "a b/c", "/x", ""])
def test_what_is_no_repository_is_refused_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    hub = Hub()
    with pytest.raises(ConfigError, match="expected owner/name"):
        push(tmp_path, hub, name)
    assert hub.private == {}


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    def refused(code: int) -> HfHubHTTPError:
        request = httpx.Request("POST", "https://hub")
        return HfHubHTTPError("no", response=httpx.Response(code, request=request))

    with pytest.raises(MissingError, match="hf auth login"):
        push(tmp_path, Hub(LocalTokenNotFoundError("no token")))
    with pytest.raises(DiffexpoError, match=r"did not take it \(no\); log in as its owner"):
        push(tmp_path, Hub(refused(403)))
    with pytest.raises(DiffexpoError, match="check the network and try again"):
        push(tmp_path, Hub(OSError("no route to host")))
