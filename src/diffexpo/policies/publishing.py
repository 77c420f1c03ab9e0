"""An export put on the hub, as it lies on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffexpo.errors import ConfigError, DiffexpoError, MissingError

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_repository(name: str) -> None:
    """Raise a ConfigError unless a name is of the form `owner/name`."""
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(f"--push {name!r}: expected owner/name, the repository on the hub")


def push_folder(folder: Path, repository: str, *, private: bool, title: str, client: Any = None) -> str:
    """Upload a folder, weights and card, to a repository of the hub, which is made if it is new.

    Args:
        folder: What is uploaded, all of it. repository: `owner/name`.
        private: Whether a new repository is seen by its owner alone; an existing one stays as it is.
        title: What the commit is called.
        client: Has `create_repo` and `upload_folder` as `huggingface_hub.HfApi`, which is the default.
    Returns:
        The address of the commit.
    Raises:
        MissingError: nobody is logged in. DiffexpoError: the hub refused, or cannot be reached.
    """
    check_repository(repository)
    client = HfApi() if client is None else client
    try:
        client.create_repo(repository, private=private, exist_ok=True)
        done = client.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=title)
    except LocalTokenNotFoundError as error:
        raise MissingError(
            f"--push {repository}: log in first with `hf auth login`, or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())
        response = getattr(error, "response", None)
        denied = getattr(response, "status_code", None) in (401, 403)
        advice = "log in as its owner with `hf auth login`" if denied else "check the network and try again"
        raise DiffexpoError(f"--push {repository}: the hub did not take it ({said}); {advice}") from error
    return str(getattr(done, "commit_url", done))
