"""`diffexpo doctor` and `diffexpo env`: is this machine ready, and what is on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

import typer

from diffexpo import __version__, assembly
from diffexpo.cli.options import AsJson

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft",
    "safetensors", "pyarrow", "numpy", "pillow", "pydantic",
)  # fmt: skip
EXTRAS = {"label": ("fastapi", "uvicorn"), "track": ("tensorboard",)}
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the doctor: ok, warn or fail; what was found; what to do."""

    state: str
    what: str
    fix: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Check versions, accelerator, memory, disk, extras and embedded models; exit code 4 if one is broken."""
    checks = list(_checks())
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f" {check.state.upper():4}  {check.what}{f' -> {check.fix}' if check.fix else ''}")
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(assembly.DiffexpoError.exit_code)


def env(as_json: AsJson = False) -> None:
    """Print versions and hardware as a block to paste into a bug report."""
    settings = sorted(name for name in os.environ if name.startswith("DIFFEXPO_"))
    found = {
        "diffexpo": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{name: _version(name) or "not installed" for name in (*PACKAGES, "typer", "rich", "pyyaml")},
        "accelerator": _accelerator().what,
        "memory": _memory().what,
        "DIFFEXPO_ variables:": ", ".join(settings) or "none",
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(value if name in ("accelerator", "memory") else f"{name} {value}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator() -> Check:
    if util.find_spec("torch") is None:
        return Check("fail", "no accelerator information: torch is not installed", "pip install torch")
    import torch

    if not torch.accelerator.is_available():
        machine = f"cpu with {torch.get_num_threads()} threads"
        return Check("warn", f"no accelerator, {machine}: the emoji recipes run, SD 1.5 is slow")
    device = torch.accelerator.current_accelerator()
    text = f"accelerator {device}, {torch.accelerator.device_count()} device(s)"
    if device is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        text += f": {torch.cuda.get_device_name()}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        text += f", bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    return Check("ok", text)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    text = f"memory {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < 3 * GIB:
        return Check("warn", text, "the emoji recipes need about 3 GiB; close other programs")
    return Check("ok", text)


def _checks() -> Iterator[Check]:
    found = {name: _version(name) for name in PACKAGES}
    installed = [f"{name} {version}" for name, version in found.items() if version]
    yield Check("ok", " | ".join([f"python {platform.python_version()}", *installed]))
    if missing := [name for name, version in found.items() if version is None]:
        yield Check("fail", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    yield _torchvision()
    yield _accelerator()
    yield _memory()
    free = shutil.disk_usage(Path.cwd()).free
    text = f"disk {free / GIB:.1f} GiB free here"
    yield Check("ok", text) if free > GIB else Check("warn", text, "a run needs about 1 GiB")
    token = "set" if os.environ.get("HF_TOKEN") else "not set (needed for gated models only)"
    offline = ", offline" if os.environ.get("HF_HUB_OFFLINE") else ""
    cache = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    yield Check("ok", f"model hub cache {cache}{offline}, HF_TOKEN {token}")
    for extra, modules in EXTRAS.items():
        if missing := [name for name in modules if util.find_spec(name) is None]:
            told = f"extra '{extra}' missing ({', '.join(missing)})"
            yield Check("warn", told, f'pip install "diffexpo[{extra}]"')
        else:
            yield Check("ok", f"extra '{extra}' installed")
    if missing := assembly.missing_assets():
        yield Check("fail", f"embedded emoji world incomplete: {', '.join(missing)}", "reinstall diffexpo")
    else:
        yield Check("ok", "embedded emoji world complete")


def _torchvision() -> Check:
    # A torchvision built for another torch stops transformers and diffusers from importing.
    if util.find_spec("torchvision") is None:
        return Check("ok", "torchvision absent (not needed)")
    code, named = [sys.executable, "-c", "import torchvision"], f"torchvision {_version('torchvision')}"
    if subprocess.run(code, capture_output=True, text=True, check=False).returncode == 0:
        return Check("ok", f"{named} imports (not needed)")
    return Check("fail", f"{named} does not import", "pip uninstall torchvision")
