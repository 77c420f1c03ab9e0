"""Work ahead of its turn: the order, the exceptions and the memory are those of plain work."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest

from diffexpo.bounded.images import verify_image, whole_image
from diffexpo.data.offline import ahead
from diffexpo.data.offline.ahead import map_ahead
from diffexpo.errors import ImportFormatError

from .conftest import jpeg


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    found = list(map_ahead(slow_square, iter(range(200)), lambda number: number % 5, threads=threads))
    assert found == [number * number for number in range(200)]


def test_two_items_are_worked_on_at_once() -> None:
    met = threading.Barrier(2)
    # each call waits for the other: one thread alone would wait for ever
    assert len(list(map_ahead(lambda _: met.wait(10), iter(range(4)), lambda _: 1, threads=2))) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_behind_what_was_before_it(threads: int) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ImportFormatError("cut here")

    found = []
    with pytest.raises(ImportFormatError, match="cut here"):
        found.extend(map_ahead(slow_square, items(), lambda _: 1, threads=threads))
        pytest.fail("the error was lost")
    stream = map_ahead(slow_square, items(), lambda _: 1, threads=threads)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    stream = map_ahead(lambda number: 1 // (number - 1), iter(range(3)), lambda _: 1, threads=threads)
    assert next(stream) == -1
    with pytest.raises(ZeroDivisionError):
        next(stream)


@pytest.mark.parametrize(("weight", "most"), [(1, ahead.MAX_ITEMS), (ahead.MAX_WEIGHT // 4, 4), (10**12, 1)])
def test_no_more_is_read_ahead_than_the_memory_may_hold(weight: int, most: int) -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(500):
            read.append(number)
            yield number

    for used, _ in enumerate(map_ahead(slow_square, items(), lambda _: weight, threads=2), start=1):
        assert len(read) <= used - 1 + most
        if used == 100:
            break


def test_a_reader_that_stops_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    stream = map_ahead(slow_square, iter(range(1000)), lambda _: 1, threads=4)
    assert [next(stream), next(stream)] == [0, 1]
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_threads_that_verify_images_leave_the_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    list(map_ahead(lambda data: verify_image(data), iter([jpeg(n) for n in range(100)]), len, threads=4))
    assert warnings.filters == before


def test_threads_that_use_whole_images_leave_the_warnings_and_errors_as_they_were() -> None:
    before = list(warnings.filters)

    def side(data: bytes) -> int:
        with whole_image(data) as picture:
            return picture.width

    assert set(map_ahead(side, iter([jpeg(n) for n in range(100)]), len, threads=4)) == {side(jpeg(0))}
    assert warnings.filters == before
    # An error of the one who uses a picture is no damage of the picture.
    with pytest.raises(ZeroDivisionError), whole_image(jpeg(0)):
        raise ZeroDivisionError
    with pytest.raises(ImportFormatError, match="truncated"), whole_image(jpeg(0)[:-30]):
        pytest.fail("it is not whole")


def test_one_item_is_made_while_the_one_before_it_is_used() -> None:
    met = threading.Barrier(2)

    def items() -> Iterator[int]:
        yield 0
        for number in range(1, 20):
            # the one who uses the item before this one waits for it to be begun
            met.wait(10)
            yield number

    found = []
    for item in ahead.one_ahead(items()):
        found.append(item)
        if item < 19:
            met.wait(10)
    assert found == list(range(20))


def test_no_more_than_one_item_is_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for used, _ in enumerate(ahead.one_ahead(items()), start=1):
        time.sleep(0.002)
        assert len(made) <= used + 1


def test_an_item_that_cannot_be_made_is_heard_of_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("cannot be read")

    found = []
    with pytest.raises(OSError, match="cannot be read"):
        found.extend(ahead.one_ahead(items()))
        pytest.fail("the error was lost")
    stream = ahead.one_ahead(items())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="cannot be read"):
        next(stream)
    # the owner's own error stands before that of an item
    with pytest.raises(ZeroDivisionError), closing(ahead.one_ahead(items())) as stream:
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
        raise ZeroDivisionError
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
