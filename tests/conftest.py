"""For all tests: no network, one thread of computation, nothing of the developer's settings."""

import os

for name in [name for name in os.environ if name.startswith("DIFFEXPO_")]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
