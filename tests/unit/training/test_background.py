"""A call in a thread of its own gives what a call at once gives, whatever it raises."""

from __future__ import annotations

import threading

import pytest

from diffexpo.training.background import Background


@pytest.mark.parametrize("in_background", [True, False])
def test_the_result_is_that_of_the_call_in_the_thread_that_was_asked_for(in_background):
    call = Background(threading.current_thread, name="extra", in_background=in_background)
    assert (call.result() is not threading.current_thread()) == in_background
    assert call.result().name == ("extra" if in_background else threading.current_thread().name)
    assert not call.result().is_alive() or not in_background


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_what_the_call_raises_is_raised_with_its_result(error, in_background):
    def fail() -> None:
        raise error

    call = Background(fail, name="extra", in_background=in_background)
    call.wait()
    with pytest.raises(type(error)):
        call.result()


def test_waiting_ends_when_the_call_does():
    may_end, ended = threading.Event(), []
    call = Background(lambda: ended.append(may_end.wait(5)), name="extra")
    assert not ended
    may_end.set()
    call.wait()
    assert ended == [True]
