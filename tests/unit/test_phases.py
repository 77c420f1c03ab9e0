"""An error knows the phases that it passed through."""

from __future__ import annotations

import pytest

from diffexpo.phases import PHASES, phase, phase_of


@phase("decoding images")
def decode() -> None:
    raise RuntimeError("out of memory")


def test_the_inner_kind_of_work_comes_before_the_outer() -> None:
    with pytest.raises(RuntimeError) as caught, phase("drawing images"):
        decode()
    assert phase_of(caught.value) == "decoding images"
    with pytest.raises(RuntimeError) as caught, phase("exporting"):
        decode()
    assert phase_of(caught.value) == "exporting"


def test_causes_count_and_an_error_outside_of_any_phase_has_none() -> None:
    with pytest.raises(RuntimeError) as caught:
        decode()
    assert phase_of(ValueError("other"), caught.value) == "decoding images"
    assert phase_of(ValueError("other")) is None and len(set(PHASES)) == len(PHASES)


def test_a_function_that_is_marked_gives_its_result_each_time() -> None:
    @phase("training")
    def double(value: int) -> int:
        return 2 * value

    assert (double(2), double(3)) == (4, 6)
