"""What is measured of a base's predictions, on stand-ins whose answers are known."""

from types import SimpleNamespace

import pytest
import torch

from worlds.scenes import responses
from worlds.scenes.models import make_ddim, make_schedule


@pytest.mark.parametrize("schedule", [make_ddim, make_schedule], ids=["noise", "v"])
def test_the_clean_prediction_of_a_perfect_network_is_the_image(schedule):
    torch.manual_seed(0)
    x0, noise, level = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), 700
    pipeline = SimpleNamespace(scheduler=schedule())
    alpha, sigma = responses.scales(pipeline, level)
    is_v = pipeline.scheduler.config.prediction_type == "v_prediction"
    said = alpha * noise - sigma * x0 if is_v else noise
    pipeline.unet = lambda x_t, t, states: SimpleNamespace(sample=said)
    pipeline.text_encoder = lambda ids: SimpleNamespace(last_hidden_state=None)
    pipeline.tokenizer = lambda texts, **options: SimpleNamespace(input_ids=None)
    found = responses.clean_prediction(pipeline, alpha * x0 + sigma * noise, level, ["", ""])
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exaggeration", [1.0, 2.0])
def test_a_base_that_says_twice_what_it_knows_has_a_scale_of_one_half(monkeypatch, exaggeration):
    latents = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    images = torch.zeros(4, 64, 64, 3, dtype=torch.uint8).numpy()
    monkeypatch.setattr(
        responses, "true_scenes", lambda num, seed: (images, [SimpleNamespace(text="a key")] * num)
    )
    monkeypatch.setattr(responses, "encode_images", lambda vae, pixels: (latents, None))
    answer = lambda pipeline, x_t, level, captions: (exaggeration if captions[0] else 0.0) * latents
    monkeypatch.setattr(responses, "clean_prediction", answer)
    config = SimpleNamespace(scaling_factor=1.0)
    pipeline = SimpleNamespace(scheduler=make_ddim(), vae=SimpleNamespace(config=config))
    found = responses.caption_scales(pipeline, num=4, levels=(900, 500))
    assert found == pytest.approx({"900": 1 / exaggeration, "500": 1 / exaggeration})
