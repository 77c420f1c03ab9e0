"""What is said when memory runs out: the phase, the amounts, and settings that exist and are accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.config import RunConfig, load_config
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.errors import Interrupted, OutOfMemory, PolicyError, TrainingError, memory_failure
from diffexpo.estimate.advice import savings_in
from diffexpo.estimate.out_of_memory import explain_memory, message
from diffexpo.phases import PHASES

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.10 GiB is free. "
    "Including non-PyTorch memory, this process has 78.04 GiB memory in use."
)


def config(*sets: str) -> RunConfig:
    return load_config([], sets, {}).config


def told(error: BaseException, settings: RunConfig | None = None) -> str:
    with pytest.raises(OutOfMemory) as caught, explain_memory(settings or config(), Path("runs/x")):
        raise error
    assert caught.value.exit_code == 4
    return str(caught.value)


def raised(allocate: Callable[[], object]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    return caught.value


def test_the_amounts_are_those_of_the_allocator() -> None:
    assert "2.50 GiB asked for, 1.10 GiB of 79.15 GiB free" in told(torch.OutOfMemoryError(CUDA))
    assert f"{2**50 / 2**30:.4g} GiB asked for" in told(raised(lambda: torch.empty(2**48)))
    assert "8.00 PiB asked for" in told(raised(lambda: np.empty(2**50)))
    assert "an unknown amount asked for" in told(MemoryError())
    assert "an unknown amount" in told(torch.OutOfMemoryError("not in words that are known"))


def test_a_cause_counts_and_other_errors_pass_as_they_are() -> None:
    wrapped = PolicyError("unet cannot be loaded")
    wrapped.__cause__ = torch.OutOfMemoryError(CUDA)
    assert "2.50 GiB asked for" in told(wrapped)
    assert memory_failure(TrainingError("loss is out of memory's reach")) is None
    for error in (
        TrainingError("x"),
        RuntimeError("shapes differ"),
        Interrupted("stopped"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, explain_memory(config(), Path("runs/x")):
            raise error
        assert caught.value is error


def test_a_stop_is_a_stop_whatever_caused_it() -> None:
    stopped = Interrupted("stopped by SIGINT")
    stopped.__cause__ = MemoryError()
    with pytest.raises(Interrupted), explain_memory(config(), Path("runs/x")):
        raise stopped


def test_settings_that_may_change_on_resuming_stand_apart() -> None:
    settings = config("training.micro_batch_size=8", "tuning.kind=lora", "explore.merge_lora=true")
    text = "\n".join(_lines("drawing images", settings))
    now, _, later = text.partition("a new run")
    assert "diffexpo run --resume runs/x --set SETTING" in now and "explore.overlap_scoring=false" in now
    assert "explore.batch_size=32" in later and "explore.merge_lora=false" in later
    training = "\n".join(_lines("training", settings))
    assert "training.micro_batch_size=4" in training.partition("a new run")[0]


def test_where_nothing_can_change_the_run_goes_on_elsewhere() -> None:
    text = "\n".join(_lines("exporting", config()))
    assert (
        "diffexpo run --resume runs/x goes on where more memory is free" in text and "a new run" not in text
    )


def _lines(words: str, settings: RunConfig) -> list[str]:
    """What is said of a phase."""
    assert words in PHASES
    return message(settings, Path("runs/x"), words, MemoryError()).splitlines()


CONFIGS = {
    "full": (),
    "on an accelerator": ("model.device=cuda:0", "training.mixed_precision=bf16"),
    "small copies": (
        "training.mixed_precision=bf16",
        "tuning.reference_dtype=bfloat16",
        "tuning.reference_device=cpu",
    ),
    "lora": ("tuning.kind=lora", "explore.merge_lora=true"),
    "rollout": ("algorithm.type=ddpo", "offline.source=null", "explore.sampler={name: ddim, eta: 1.0}"),
    "smallest": ("training.micro_batch_size=1", "explore.batch_size=1", "training.pair_gradient=two_pass"),
}


@pytest.mark.parametrize("sets", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("phase", [*PHASES, None])
def test_every_advised_setting_is_accepted_and_new(phase: str | None, sets: tuple[str, ...]) -> None:
    before = config(*sets)
    advised = savings_in(phase, before)
    for change in advised:
        assert change.price and config(*sets, *change.settings) != before
    if not advised:
        assert phase in ("exporting", "encoding images")


def test_the_first_advice_for_training_can_be_set_at_once() -> None:
    (setting,) = savings_in("training", config())[0].settings
    assert setting.split("=")[0] in CHANGEABLE
