"""Several sizes of one model: what they are, which are refused, and that a network is told the size of each picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from diffexpo.config.schema import ModelConfig
from diffexpo.data.latents import image_sizes, latent_shapes
from diffexpo.errors import ConfigError
from diffexpo.estimate.networks import read_blueprint
from diffexpo.policies.sizes import size_of_aspect
from tests.contract.transformer_families import build_flux, build_pixart, build_sd3
from tests.contract.unet_families import build_sd15, build_sdxl
from tests.unit.policies.families import FULL, load, refuse

BUILDERS: dict[str, Callable[[Path, int], object]] = {
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "flux_dev": partial(build_flux, is_distilled=True),
    "pixart": build_pixart,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny folder, built when first asked for; pictures of 16 x 16 pixels, 2 x 2 pixels a latent."""
    root = tmp_path_factory.mktemp("families")

    def made(name: str) -> Path:
        if not (root / name).exists():
            BUILDERS[name](root / name, 0)
        return root / name

    return made


@pytest.mark.parametrize(
    ("aspect", "area", "multiple", "size"),
    [
        ("1:1", 512 * 512, 8, (512, 512)),
        ("3:2", 1024 * 1024, 8, (840, 1256)),
        ("2:3", 1024 * 1024, 8, (1256, 840)),
        ("16:9", 1024 * 1024, 64, (768, 1344)),
        ("100:1", 64 * 64, 16, (16, 640)),
    ],
)
def test_an_aspect_ratio_keeps_the_area_as_far_as_multiples_allow(
    aspect: str, area: int, multiple: int, size: tuple[int, int]
) -> None:
    assert size_of_aspect(aspect, area, multiple) == size


def test_sizes_are_those_that_were_named_and_the_first_one_first(folder: Callable[[str], Path]) -> None:
    policy = load(folder("sd15"), buckets=((12, 20), "1:2"))
    assert latent_shapes(policy) == ((4, 8, 8), (4, 6, 10), (4, 11, 6))
    assert policy.latent_shape == (4, 8, 8)
    assert image_sizes(policy) == ((16, 16), (12, 20), (22, 12))
    assert latent_shapes(load(folder("sd15"))) == ((4, 8, 8),)
    model = ModelConfig(buckets=((12, 20), "1:2"))
    blueprint = read_blueprint(str(folder("sd15")), model)
    assert blueprint.image_sizes == image_sizes(policy) and blueprint.latent_shape == (4, 11, 6)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_picture_of_another_size_is_predicted_as_by_a_model_of_that_size(
    name: str, folder: Callable[[str], Path]
) -> None:
    """Whatever the network is told of the size follows from x_t, and nothing of it from where the run began."""
    size = (12, 16)
    several = load(folder(name), FULL, resolution=(16, 12), buckets=(size,))
    alone = load(folder(name), FULL, resolution=size)
    assert latent_shapes(several) == ((4, 8, 6), (4, 6, 8)) and alone.latent_shape == (4, 6, 8)
    x_t = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        found, expected = (
            policy.predict(x_t, t, policy.encode_prompts(["a cat", ""])) for policy in (several, alone)
        )
    assert torch.equal(found, expected)
    picture = several.decode_latents(x_t)
    assert picture.shape == (2, 3, *size)
    assert torch.equal(several.encode_images(picture), alone.encode_images(picture))


def test_the_network_of_xl_hears_the_size(folder: Callable[[str], Path]) -> None:
    policy = load(folder("sdxl"), FULL)
    square = torch.ones(1, 4, 8, 8)
    seen = []
    policy.weights.network.add_embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        for x_t in (square, torch.ones(1, 4, 8, 10)):
            policy.predict(x_t, torch.tensor([0.5]), policy.encode_prompts(["a cat"]))
    assert not torch.equal(*seen)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "sd15",
            {"buckets": ((13, 20),)},
            r"model.buckets.0=\[13, 20\]: expected multiples of 2.*nearest is \[12, 20\]",
        ),
        ("sd3", {"buckets": ((12, 16), (14, 16))}, r"model.buckets.1=\[14, 16\]: expected multiples of 4"),
        ("flux_dev", {"buckets": ((18, 16),)}, r"model.buckets.0=\[18, 16\]: expected multiples of 4"),
        ("sd15", {"buckets": ((16, 16),)}, r"model.buckets.0=\[16, 16\] is \[16, 16\], as is the first size"),
        ("sd15", {"buckets": ((12, 20), (12, 20))}, r"model.buckets.1=.*as is model.buckets.0"),
        ("sd15", {"buckets": ("101:100",)}, r"model.buckets.0=101:100 is \[16, 16\], as is the first size"),
        ("sd3", {"buckets": ((8, 40),)}, r"model.buckets.0: gives 2 x 10 patches, .* knows positions for 8"),
        ("flux_dev", {"buckets": ((12, 16),)}, r"model.buckets.0 has 0.75 times the area.*noise levels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_reason(
    name: str, model: dict[str, object], message: str, folder: Callable[[str], Path]
) -> None:
    refuse(folder(name), ConfigError, message, **model)


def test_only_levels_that_follow_from_the_area_ask_for_equal_areas(folder: Callable[[str], Path]) -> None:
    assert len(latent_shapes(load(folder("flux_dev"), resolution=(16, 20), buckets=((20, 16),)))) == 2
    assert len(latent_shapes(load(folder("pixart"), buckets=((8, 16),)))) == 2
