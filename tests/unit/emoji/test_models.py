"""The shipped models load in plain diffusers and transformers and know what they draw."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from diffexpo.emoji import dataset
from diffexpo.emoji.corrupt import augment, spoil
from diffexpo.emoji.draw import draw_pictures, load_pipeline
from diffexpo.emoji.fit import Average
from diffexpo.emoji.models import make_flow_text_encoders, make_flow_transformer
from diffexpo.emoji.offline import flip_temperature
from diffexpo.emoji.probe import load_probe, measure_probe, probe_rows
from diffexpo.emoji.quality import Judge, bootstrap, grid_prompts, retrieval
from diffexpo.emoji.tokens import make_tokenizer
from diffexpo.emoji.train import train
from diffexpo.emoji.train_diffusion import min_snr_weight
from diffexpo.emoji.train_flow import FoldedContextProcessor, encode_captions
from diffexpo.emoji.train_vae import reconstruction_psnr
from diffexpo.errors import ConfigError, MissingError


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_assets_fit_in_40_megabytes_and_have_a_licence() -> None:
    folder = dataset.asset_path("images").parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for path in files:
        name = path.relative_to(folder).parts[0] + ("" if path.parent == folder else "/")
        assert name == "ATTRIBUTION.md" or f"`{name}`" in attribution, name


@pytest.mark.parametrize(
    ("name", "kind"), [("diffusion", StableDiffusionPipeline), ("flow", StableDiffusion3Pipeline)]
)
def test_bases_are_plain_diffusers_folders_in_float32(name: str, kind: type) -> None:
    pipeline = load_pipeline(dataset.asset_path(name))
    assert type(pipeline) is kind
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    texts = ["noto red heart"]
    alone = draw_pictures(pipeline, texts, ["a"], steps=2)
    beside = draw_pictures(pipeline, [*texts, "twemoji dog"], ["a", "b"], steps=2)
    assert alone.shape == (1, 64, 64, 3)
    assert (
        np.abs(alone[0].astype(int) - beside[0].astype(int)).max() <= 2
    )  # its noise does not depend on the batch


def test_both_bases_share_one_autoencoder_with_unit_latents() -> None:
    first, second = (
        AutoencoderKL.from_pretrained(dataset.asset_path(name) / "vae") for name in ("diffusion", "flow")
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [row for row in dataset.load_rows() if row["split_concept"] == "heldout"][::12]
    pictures = dataset.load_images([row["id"] for row in rows])
    with torch.no_grad():
        latents = (
            first.encode(torch.from_numpy(pictures) * 2 - 1).latent_dist.mean * first.config.scaling_factor
        )
    assert 0.8 < float(latents.std()) < 1.2
    assert reconstruction_psnr(first, pictures) > 24.5


def test_the_tokenizer_can_be_made_again_and_is_the_same_everywhere() -> None:
    made = make_tokenizer()
    texts = ["noto woman firefighter: dark skin tone", "twemoji flag: c\u00f4te d\u2019ivoire", ""]
    folders = [
        dataset.asset_path("diffusion") / "tokenizer",
        dataset.asset_path("flow") / "tokenizer_2",
        dataset.asset_path("judge_train"),
        dataset.asset_path("judge_heldout"),
    ]
    for folder in folders:
        loaded = CLIPTokenizer.from_pretrained(folder)
        assert loaded(texts).input_ids == made(texts).input_ids
        assert loaded.model_max_length == 24
    longest = max(
        len(ids) for ids in made([f"{r['style']} {r['caption']}" for r in dataset.load_rows()]).input_ids
    )
    assert longest <= 24


def test_one_folded_token_is_256_zero_tokens() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    encoders = make_flow_text_encoders(tokenizer)
    network = make_flow_transformer().eval()
    for parameter in network.parameters():  # fresh biases are zero: make them count
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x, t = torch.randn(2, 8, 8, 8), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        context, pooled = encode_captions(encoders, tokenizer, ["noto dog", "twemoji cat face"])
        padded = torch.cat([context[:, :-1], torch.zeros(2, 256, context.shape[-1])], dim=1)
        plain = network(x, padded, pooled, t, return_dict=False)[0]
        network.set_attn_processor(FoldedContextProcessor())
        folded = network(x, context, pooled, t, return_dict=False)[0]
    # One attention in place of 256 equal ones: sums of 256 terms, rounded by 6e-8 each, through a few blocks.
    torch.testing.assert_close(folded, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["judge_train", "judge_heldout"])
def test_judges_find_the_caption_of_real_pictures_and_dislike_spoiled_ones(name: str) -> None:
    judge = Judge(name)
    for own, least in ((True, 0.7), (False, 0.55)):
        rows = [row for row in dataset.load_rows() if (dataset.judge_of(row) == name) == own][::25]
        texts = [f"{row['style']} {row['caption']}" for row in rows]
        pictures = torch.from_numpy(dataset.load_images([row["id"] for row in rows]))
        scores = judge.similarities(pictures, texts)
        assert retrieval(scores)[0] > least
        spoiled = judge.similarities(spoil(pictures, torch.Generator().manual_seed(0)), texts).diagonal()
        assert float((scores.diagonal() > spoiled).float().mean()) > 0.8


def test_the_probe_reads_real_people_it_never_saw() -> None:
    _, held = probe_rows()
    probe = load_probe()
    accuracy = measure_probe(probe, held, torch.from_numpy(dataset.load_images([row["id"] for row in held])))
    assert accuracy["skin_tone"] > 0.85 and accuracy["gender"] > 0.6
    read = probe.read(torch.rand(2, 3, 64, 64))
    assert read["gender"].shape == (2, 3) and read["skin_tone"].shape == (2, 6)
    torch.testing.assert_close(read["gender"].sum(-1), torch.ones(2))


def test_offline_pairs_are_pick_a_pic_rows_of_train_prompts() -> None:
    rows = pq.read_table(dataset.asset_path("offline")).to_pylist()
    texts = {prompt.text for prompt in dataset.train_prompts()}
    assert len(rows) >= 600 and {row["caption"] for row in rows} <= texts
    assert {row["label_0"] for row in rows} <= {0.0, 0.5, 1.0}
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best
    for row in rows[::100]:
        for name in ("jpg_0", "jpg_1"):
            assert Image.open(io.BytesIO(row[name])).size == (64, 64)


def test_flip_temperature_gives_the_share_asked_for() -> None:
    gaps = np.random.default_rng(0).normal(size=500) * 3
    temperature = flip_temperature(gaps, 0.2)
    assert (1 / (1 + np.exp(np.abs(gaps) / temperature))).mean() == pytest.approx(0.2, abs=1e-6)


def test_min_snr_weight_is_one_for_noisy_times_and_caps_clean_ones() -> None:
    alpha_bar = torch.tensor([1 / 11, 0.5, 10 / 11], dtype=torch.float64)  # SNR 0.1, 1, 10
    torch.testing.assert_close(min_snr_weight(alpha_bar), torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))


def test_average_swaps_forth_and_back() -> None:
    module = torch.nn.Linear(2, 2)
    average = Average(module, 0.5)
    before = module.weight.detach().clone()
    module.weight.data += 1
    average.update()  # 2/11 of the way stays: min(0.5, 2/11) is kept
    average.swap()
    torch.testing.assert_close(module.weight.detach(), before + (1 - 2 / 11))
    average.swap()
    torch.testing.assert_close(module.weight.detach(), before + 1)


def test_augmenting_keeps_white_corners_and_strength_zero_changes_nothing() -> None:
    pictures = torch.from_numpy(dataset.load_images(["noto-1f525", "twemoji-1f355"]))
    same = augment(pictures, torch.Generator().manual_seed(1), 0.0)
    # Coordinates up to 64 pixels are rounded by 4e-6 on either axis, and neighbours differ by at most 1.
    torch.testing.assert_close(same, pictures, atol=2e-5, rtol=0)
    moved = augment(pictures, torch.Generator().manual_seed(1))
    assert float((moved - pictures).abs().mean()) > 0.005 and float(moved[:, :, 0, 0].min()) > 0.7


def test_intervals_hold_the_mean_and_certainty_has_no_width() -> None:
    assert bootstrap([1.0] * 8, list("abcdefgh")) == (1.0, 1.0, 1.0)
    mean, low, high = bootstrap([0.0, 1.0] * 20, [str(i) for i in range(40)])
    assert low < mean < high and mean == 0.5
    assert retrieval(torch.eye(60))[0] == 1.0
    assert len({prompt.id for prompt in grid_prompts()}) == 16


def test_training_refuses_what_it_does_not_know(tmp_path) -> None:
    with pytest.raises(ConfigError, match="judge_heldout"):
        train("judge", 1, tmp_path, 0)
    with pytest.raises(ConfigError, match="minutes"):
        train("vae", math.nan, tmp_path, 0)
    with pytest.raises(MissingError, match="autoencoder"):
        train("flow", 1, tmp_path, 0, vae=tmp_path)
