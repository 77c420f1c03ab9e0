"""What is evaluated, as it is typed: a model, a model with a LoRA, a run's iterate, or a folder of images.

    [LABEL=]MODEL[+LORA][,guidance=2.5][,scale=0.8]

Imports without torch.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffexpo.config.iterates import split_iterate
from diffexpo.config.worlds import world_of
from diffexpo.errors import ConfigError, MissingError

RUNS = Path("runs")
BASELINE = "baseline"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
FORM = "[LABEL=]MODEL[+LORA][,guidance=G][,scale=S]"


@dataclass(frozen=True)
class Entry:
    """One model of an evaluation, at one guidance.

    `kind`: a `model` (folder, hub id or embedded name), an iterate of a `run` (`iteration`; None: what the
    run kept), the offline DPO `baseline` that was trained beside a run, or `images` that others have drawn.
    `lora` is merged into a model, multiplied by `scale`. `guidance` None is that of the suite.
    """

    label: str
    kind: str
    path: str
    iteration: int | None = None
    lora: str | None = None
    scale: float = 1.0
    guidance: float | None = None

    @property
    def folder(self) -> str:
        """Name of the folder that its images lie in."""
        return re.sub(r"[^\w.@+-]+", "-", self.label).strip("-") or "model"

    def told(self) -> str:
        """What it is, in words."""
        if self.kind == "images":
            return f"images of {self.path}"
        if self.kind == BASELINE:
            return f"offline DPO beside run {self.path}"
        which = "" if self.iteration is None else f", iterate {self.iteration}"
        lora = (
            ""
            if self.lora is None
            else f" + {self.lora}" + (f" x {self.scale:g}" if self.scale != 1.0 else "")
        )
        return f"{self.kind} {self.path}{which}{lora}"


def read_entries(texts: Sequence[str], guidances: Sequence[float] = ()) -> list[Entry]:
    """The entries of a command, each at every one of the guidance scales.

    Raises:
        MissingError: there is nothing of a name.
        ConfigError: a form that is not `FORM`, a scale without a LoRA, or two entries of one label.
    """
    entries: list[Entry] = []
    for text in texts:
        entry = read_entry(text)
        if not guidances or entry.kind == "images" or entry.guidance is not None:
            entries.append(entry)
        else:
            entries += [
                replace(entry, label=f"{entry.label} g{guidance:g}", guidance=guidance)
                for guidance in guidances
            ]
    folders = [entry.folder for entry in entries]
    for entry in entries:
        if folders.count(entry.folder) > 1:
            raise ConfigError(
                f"{folders.count(entry.folder)} models are called {entry.label!r}; name them apart: "
                f"LABEL={entry.path}"
            )
    return entries


def read_entry(text: str) -> Entry:
    """One entry; see `read_entries`."""
    label, named, options = _parts(text)
    guidance, scale = options.get("guidance"), options.get("scale")
    base, plus, lora = ("", "", "") if Path(named).expanduser().exists() else named.rpartition("+")
    if plus:
        entry = _model(text, base)
        tail = Path(lora).name.removesuffix(".safetensors")
        return replace(
            entry,
            label=label or f"{entry.label}+{tail}" + ("" if scale is None else f" x{scale:g}"),
            lora=lora,
            scale=1.0 if scale is None else scale,
            guidance=guidance,
        )
    if scale is not None:
        raise ConfigError(
            f"{text!r}: scale multiplies a LoRA, and none is named; expected BASE+LORA,scale={scale:g}"
        )
    entry = _run(named) or _images(text, named) or _model(text, named)
    if entry.kind == "images" and guidance is not None:
        raise ConfigError(f"{text!r}: a folder of images is drawn already; leave guidance out")
    told = "" if label or guidance is None else f" g{guidance:g}"
    return replace(entry, label=label or f"{entry.label}{told}", guidance=guidance)


def _parts(text: str) -> tuple[str, str, dict[str, float]]:
    """Label, what is named, and options; a path that exists is never cut."""
    if Path(text).expanduser().exists():
        return "", text, {}
    named, *given = text.split(",")
    options: dict[str, float] = {}
    for option in given:
        key, _, value = option.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError:
            key = ""
        if key.strip() not in ("guidance", "scale"):
            raise ConfigError(f"model {text!r}: {option!r} is no option; expected {FORM}")
    label, equals, rest = named.partition("=")
    return (label, rest, options) if equals else ("", named, options)


def _run(name: str) -> Entry | None:
    """What a run trained, named by its folder or below `runs`: its result, an iterate (@N), its baseline."""
    run, iteration = split_iterate(name)
    for folder in (Path(run).expanduser(), RUNS / run):
        if (folder / "config.yaml").is_file():
            label = folder.resolve().name + ("" if iteration is None else f"@{iteration}")
            return Entry(label, "run", str(folder), iteration)
        if folder.name == BASELINE and (folder.parent / "config.yaml").is_file():
            return Entry(f"{folder.resolve().parent.name}/{BASELINE}", BASELINE, str(folder.parent))
    is_meant = Path(name).parts[:1] == RUNS.parts and not Path(name).exists()
    if iteration is not None or is_meant:
        known = [path.parent.name for path in sorted(RUNS.glob("*/config.yaml"))]
        near = difflib.get_close_matches(Path(run).name, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Runs in {RUNS}/: {', '.join(known) or 'none'}."
        what = f": {name} names its iterate {iteration}" if iteration is not None else ""
        raise MissingError(f"no run {run!r}{what}. {hint}")
    return None


def _images(text: str, name: str) -> Entry | None:
    """A folder that holds images and no model."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return None
    if any(folder.glob("*lora*.safetensors")) or (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"model {text!r}: {folder} holds a LoRA without its base model; expected BASE+{name}"
        )
    if any(path.suffix.lower() in IMAGES for path in folder.rglob("*")):
        return Entry(folder.resolve().name, "images", name)
    raise MissingError(
        f"model {text!r}: {folder} holds neither a run (config.yaml), a model (model_index.json) nor images"
    )


def _model(text: str, name: str) -> Entry:
    """A diffusers folder, a hub id or an embedded model."""
    folder = Path(name).expanduser()
    is_hub = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None
    if (
        not (folder / "model_index.json").is_file()
        and world_of(name) is None
        and (folder.exists() or not is_hub)
    ):
        what = "is no diffusers model (model_index.json)" if folder.exists() else "does not exist"
        raise MissingError(
            f"model {text!r}: {name} {what}; expected a diffusers folder, a hub id owner/name, an embedded "
            "model such as scenes:diffusion, a run or RUN@2, or a folder of images"
        )
    return Entry(name.rstrip("/").rpartition("/")[2].rpartition(":")[2], "model", name)
