"""What several processes of a run must share: settings, code and folder, before anything is spent."""

from __future__ import annotations

import hashlib
import secrets
import time
from functools import cache
from pathlib import Path

import torch

import diffexpo
from diffexpo.config import RunConfig, config_to_yaml
from diffexpo.errors import ConfigError
from diffexpo.files import write_text
from diffexpo.training.distributed import World

_PROOF = "folder.shared"
# A network file system may show a new file late.
_PATIENCE_S = 10.0


def check_same_start(config: RunConfig, run_dir: Path, world: World) -> None:
    """Refuse, with a ConfigError, processes that were not started alike."""
    if world.size == 1:
        return
    settings = hashlib.sha256(config_to_yaml(config).encode()).hexdigest()[:16]
    versions = f"{diffexpo.__version__} ({code_fingerprint()}) on torch {torch.__version__}"
    facts = {"the version of diffexpo": versions, "the fingerprint of the settings": settings}
    facts["the run folder"] = str(run_dir.expanduser().resolve())
    world.refuse_difference(facts, "start all processes with the same command, code and folder")


def check_shared_folder(run_dir: Path, world: World) -> None:
    """Refuse, with a ConfigError, a run folder that is another one on another machine."""
    if world.size == 1:
        return
    word = world.broadcast_object(secrets.token_hex(8))
    if world.rank == 0:
        write_text(run_dir / _PROOF, word)
    world.barrier()
    is_seen = _sees(run_dir / _PROOF, word)
    blind = [rank for rank, sees in enumerate(world.gather_objects([is_seen])) if not sees]
    if world.rank == 0:
        (run_dir / _PROOF).unlink()
    if blind:
        raise ConfigError(
            f"{run_dir} of process 0 is not that of processes {', '.join(map(str, blind))}: their machines "
            "have folders of this name of their own; put the run on a file system that all of them mount "
            "(--out)"
        )


@cache
def code_fingerprint() -> str:
    """A short digest of the package's source files."""
    root, digest = Path(diffexpo.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _sees(path: Path, word: str) -> bool:
    until = time.monotonic() + _PATIENCE_S
    while True:
        if path.is_file() and path.read_text(encoding="utf-8") == word:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
