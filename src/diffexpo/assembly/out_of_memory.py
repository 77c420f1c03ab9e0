"""What to do when memory runs out: in which phase it did, how much was missing, and the settings that take
less there.

The phase is read from the functions that were at work, so nothing else needs to know of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from diffexpo.config import RunConfig
from diffexpo.config.methods.data import Pairs
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.config.rules import AUTOCAST_TYPES
from diffexpo.errors import Interrupted, OutOfMemory, memory_failure

ASKED = (r"[Tt]ried to allocate (?P<size>[\d.]+ \w+)", r"Unable to allocate (?P<size>[\d.]+ \w+)")
FREE = r"capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free"
GIB = 2**30
Change = tuple[str, str]
"""A setting, as `--set` takes it, and its price."""
Advice = Callable[[RunConfig], Iterator[Change]]


@dataclass(frozen=True)
class Phase:
    """A part of a run, in words; the code that is at work in it; and what takes less memory there, cheapest
    first.

    `at_work` are couples (module, function); an empty function is any of the module or package, an empty
    module any.
    """

    words: str
    at_work: tuple[tuple[str, str], ...]
    advice: Advice


@contextmanager
def explain_memory(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Inside the block a failed allocation becomes an error that says what to do.

    Raises:
        OutOfMemory: in place of whatever the allocator, or what stood in its way, raised.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        cause = memory_failure(error)
        if cause is None:
            raise
        phase = phase_of(error, cause)
        raise OutOfMemory(_message(config, run_dir, phase, cause)) from error


def phase_of(*errors: BaseException) -> Phase:
    """The first of `PHASES` whose code was at work when the errors were raised."""
    seen = [frame for error in errors for frame in _functions(error.__traceback__)]
    for phase in PHASES:
        if any(_fits(frame, place) for frame in seen for place in phase.at_work):
            return phase
    return Phase("running", (), _everything)


def _functions(trace: TracebackType | None) -> Iterator[tuple[str, str]]:
    while trace is not None:
        code = trace.tb_frame
        yield str(code.f_globals.get("__name__", "")), code.f_code.co_name
        trace = trace.tb_next


def _fits(frame: tuple[str, str], place: tuple[str, str]) -> bool:
    (module, function), (wanted, name) = frame, place
    is_there = not wanted or module == wanted or module.startswith(f"{wanted}.")
    return is_there and (not name or function == name)


def _message(config: RunConfig, run_dir: Path, phase: Phase, cause: BaseException) -> str:
    changes = list(dict.fromkeys(phase.advice(config)))
    now = [change for change in changes if change[0].split("=")[0] in CHANGEABLE]
    later = [change for change in changes if change not in now]
    resume = f"diffexpo run --resume {run_dir}"
    lines = [f"out of memory while {phase.words}: {_amounts(cause)}"]
    if now:
        lines += [f"takes less, and can be set now: {resume} --set SETTING, cheapest first", *_table(now)]
    else:
        lines.append(f"what was saved is not lost: {resume} goes on where more memory is free")
    if later:
        lines += ["takes less, but in a new run, because results depend on it", *_table(later)]
    return "\n".join(lines)


def _table(changes: list[Change]) -> list[str]:
    width = max(len(setting) for setting, _ in changes)
    return [f"    {setting:{width}}  {price}" for setting, price in changes]


def _amounts(cause: BaseException) -> str:
    """How much was asked for and how much was free, as far as the allocator or the system says."""
    text = str(cause)
    found = next((match for pattern in ASKED if (match := re.search(pattern, text))), None)
    size = found["size"] if found else "an unknown amount"
    if size.endswith(" bytes"):
        size = f"{int(size.split()[0]) / GIB:.4g} GiB"
    stated = re.search(FREE, text)
    if stated:
        return f"{size} asked for, {stated['free']} of {stated['total']} free"
    free = _free()
    return f"{size} asked for" if free is None else f"{size} asked for, {free} free now"


def _free() -> str | None:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{free / GIB:.3g} of {total / GIB:.3g} GiB"
    system = Path("/proc/meminfo")
    if not system.is_file():
        return None
    line = next(line for line in system.read_text(encoding="utf-8").splitlines() if "MemAvailable" in line)
    return f"{int(line.split()[1]) / 2**20:.3g} GiB of main memory"


# ---- what takes less ---------------------------------------------------------------------------------------


def _training(config: RunConfig) -> Iterator[Change]:
    training = config.training
    halves = [
        size for size in range(1, training.micro_batch_size // 2 + 1) if training.batch_size % size == 0
    ]
    if halves:
        yield f"training.micro_batch_size={halves[-1]}", "same result up to rounding, slower"
    if not training.gradient_checkpointing:
        yield "training.gradient_checkpointing=true", "same result, a third more compute"
    if isinstance(config.algorithm.data, Pairs) and training.pair_gradient == "joint":
        yield "training.pair_gradient=two_pass", "same result up to rounding, one more forward pass"
    yield from _copies(config)
    if training.mixed_precision == "no":
        yield "training.mixed_precision=bf16", "rounding; faster"
    yield from _weights(config)


def _drawing(config: RunConfig) -> Iterator[Change]:
    if config.explore.overlap_scoring:
        yield "explore.overlap_scoring=false", "same result, slower where scoring takes long"
    yield from _copies(config)
    yield from _batch(config)
    if config.explore.merge_lora:
        yield "explore.merge_lora=false", "rounding; slower drawing"
    yield from _weights(config)


def _decoding(config: RunConfig) -> Iterator[Change]:
    if not config.model.vae_slicing:
        yield "model.vae_slicing=true", "same pictures up to rounding"
    yield from _drawing(config)
    if not config.model.vae_tiling:
        yield "model.vae_tiling=true", "pictures above the autoencoder's own size change a little"


def _encoding(config: RunConfig) -> Iterator[Change]:
    if not config.model.vae_slicing:
        yield "model.vae_slicing=true", "same latents up to rounding"
    if not config.model.vae_tiling:
        yield "model.vae_tiling=true", "latents of pictures above the autoencoder's own size change a little"


def _scoring(config: RunConfig) -> Iterator[Change]:
    if config.explore.overlap_scoring:
        yield "explore.overlap_scoring=false", "same result, slower where scoring takes long"
    yield from _copies(config)
    yield from _batch(config)
    yield from _scorers(config)


def _reading_texts(config: RunConfig) -> Iterator[Change]:
    yield from _copies(config)
    yield from _weights(config)
    if not config.model.drop_t5:
        yield "model.drop_t5=true", "Stable Diffusion 3 only: text is understood less well"


def _loading(config: RunConfig) -> Iterator[Change]:
    yield from _reading_texts(config)
    yield from _scorers(config)


def _exporting(config: RunConfig) -> Iterator[Change]:
    """Nothing to set: the trained weights are in the folder, and any machine can export them."""
    yield from ()


def _everything(config: RunConfig) -> Iterator[Change]:
    yield from _training(config)
    yield from _decoding(config)
    yield from _scorers(config)


def _copies(config: RunConfig) -> Iterator[Change]:
    """Frozen copies of full fine-tuning, which could lie in main memory; on a CPU they do."""
    tuning, autocast = config.tuning, config.training.mixed_precision
    if tuning.kind == "lora" or _is_on_cpu(config):
        return
    if tuning.reference_dtype == "float32" and autocast in AUTOCAST_TYPES:
        yield f"tuning.reference_dtype={AUTOCAST_TYPES[autocast]}", "same result"
    if tuning.reference_device == "same":
        yield "tuning.reference_device=cpu", "same result, slower"


def _is_on_cpu(config: RunConfig) -> bool:
    is_automatic = config.model.device == "auto"
    return not torch.accelerator.is_available() if is_automatic else config.model.device == "cpu"


def _batch(config: RunConfig) -> Iterator[Change]:
    images = config.explore.batch_size // 2
    if images:
        yield f"explore.batch_size={images}", "slower drawing; pictures are rounded by their batch"


def _weights(config: RunConfig) -> Iterator[Change]:
    if config.tuning.kind == "full":
        own = {"reference_dtype": "float32", "reference_device": "same"}
        others = [
            f" --set tuning.{name}={value}"
            for name, value in own.items()
            if getattr(config.tuning, name) != value
        ]
        yield "tuning.kind=lora" + "".join(others), "trains adapters; takes a larger learning rate"
    elif config.model.dtype == "float32":
        yield "model.dtype=bfloat16", "the frozen networks in half precision"


def _scorers(config: RunConfig) -> Iterator[Change]:
    for label, scorers in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for index, scorer in enumerate(scorers):
            if scorer.precision == "float32" and scorer.has_weights:
                yield f"{label}.{index}.precision=float16", f"scores of {scorer.name} move a little"


PHASES = (
    Phase("exporting", (("diffexpo.policies.export", ""),), _exporting),
    Phase(
        "loading scorers",
        (("diffexpo.rewards.base", "load_rewards"), ("diffexpo.assembly.objects", "build_step_judge")),
        _loading,
    ),
    Phase("loading the model", (("diffexpo.policies.base", "load_policy"),), _loading),
    Phase("scoring images", (("diffexpo.rewards", ""),), _scoring),
    Phase("encoding prompts", (("", "encode_prompts"),), _reading_texts),
    Phase("encoding pictures", (("", "encode_images"),), _encoding),
    Phase("decoding images", (("", "decode_latents"),), _decoding),
    Phase("training", (("diffexpo.training.engine", ""),), _training),
    Phase(
        "drawing images",
        (("diffexpo.diffusion.sampling", ""), ("diffexpo.evaluation.divergence", "")),
        _drawing,
    ),
)
"""In the order in which they are asked: what runs inside another comes before it."""
