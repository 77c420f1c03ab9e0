"""One set of tiny model folders for the session; tests that break files copy them first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_diffusion, tiny_flow


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion(tmp_path_factory.mktemp("models") / "diffusion")


@pytest.fixture(scope="session")
def v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion(tmp_path_factory.mktemp("models") / "v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flow(tmp_path_factory.mktemp("models") / "flow")
