"""For all tests: no network, one thread of computation, nothing of the developer's settings."""

import gc
import os
from collections.abc import Iterator

import pytest

for name in [name for name in os.environ if name.startswith("DIFFEXPO_")]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is imported and collected stays until the end: the garbage collector need not look at it again and again, neither while it
# grows (a third of that time) nor afterwards.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose single tests take long come first, so that no worker has one left when the others are done; `make test` keeps this order."""
    items.sort(key=lambda item: "unit" in item.path.parts)


def pytest_collection_finish() -> None:
    """From here on there is garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 during the test: for identities, which hold to rounding on every processor."""
    from tests.double import in_double

    with in_double():
        yield
