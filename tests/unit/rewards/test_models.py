"""Scorers with networks beyond CLIP: settings, versions, batches, half precision, and honest refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffexpo.config.rewards import RewardCard, read_card
from diffexpo.config.rewards.imagereward import ImageRewardCard
from diffexpo.errors import DiffexpoError, MissingError, RewardError
from diffexpo.rewards import weights
from diffexpo.rewards.aesthetic import AestheticReward
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.hps import HpsReward, clean_text
from diffexpo.rewards.imagereward import ImageRewardScorer
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.weights import find_weights
from diffexpo.types import Reward
from tests.tiny import WIDTH, tiny_judge
from tests.unit.rewards.checkpoints import (
    aesthetic_checkpoint,
    hps_checkpoint,
    imagereward_checkpoint,
)

PROMPTS = ["a cat", "red dog", "", "a cat", "fish on the moon"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 40, 33, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RewardCard]:
    """One configuration a type, on tiny checkpoints."""
    root = tmp_path_factory.mktemp("weights")
    judge = tiny_judge(root / "judge")
    hps, clip = hps_checkpoint(root)
    reward, bert = imagereward_checkpoint(root)
    head = aesthetic_checkpoint(root, WIDTH, 2)
    settings = {
        "clip": (judge, None),
        "pickscore": (judge, judge),
        "hpsv2": (hps, clip),
        "hpsv2.1": (hps, clip),
        "imagereward": (reward, bert),
        "aesthetic": (head, judge),
    }
    return {
        kind: read_card(name=kind, type=kind, path=str(path), base=str(base) if base else None)
        for kind, (path, base) in settings.items()
    }


@pytest.fixture(scope="module")
def scorers(configs: dict[str, RewardCard]) -> dict[str, Reward]:
    return {reward.name: reward for reward in load_rewards(list(configs.values()), str, "cpu")}


TYPES = ["clip", "pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic"]


def load(config: RewardCard, **changes: object) -> Reward:
    return load_rewards([read_card(**{**config.model_dump(), **changes})], str, "cpu")[0]


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_independent_and_deterministic(
    scorers: dict[str, Reward], images: torch.Tensor, kind: str
) -> None:
    scorer = scorers[kind]
    together = scorer.score(images, PROMPTS)
    assert together.dtype == torch.float32 and together.shape == (5,) and float(together.std()) > 1e-4
    assert torch.equal(together, scorer.score(images, PROMPTS))
    alone = torch.cat([scorer.score(images[row : row + 1], [PROMPTS[row]]) for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert scorer.score(images[:0], []).shape == (0,)
    with pytest.raises(RewardError, match="5 images but 1 prompts"):
        scorer.score(images, ["cat"])


@pytest.mark.parametrize("kind", TYPES)
def test_images_are_seen_at_8_bits(scorers: dict[str, Reward], images: torch.Tensor, kind: str) -> None:
    saved = torch.from_numpy(to_bytes(images).astype(np.float32) / 255).permute(0, 3, 1, 2)
    assert torch.equal(scorers[kind].score(images, PROMPTS), scorers[kind].score(saved, PROMPTS))


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_is_near_and_is_another_version(
    configs: dict[str, RewardCard], scorers: dict[str, Reward], images: torch.Tensor, kind: str
) -> None:
    half = load(configs[kind], precision="bfloat16")
    full = scorers[kind].score(images, PROMPTS)
    scores = half.score(images, PROMPTS)
    assert scores.dtype == torch.float32 and not torch.equal(scores, full)
    assert float((scores - full).abs().max()) < 0.05 * max(1.0, float(full.abs().max()))
    assert half.version != scorers[kind].version


@pytest.mark.parametrize("kind", TYPES)
def test_version_follows_weights_and_settings(
    configs: dict[str, RewardCard], scorers: dict[str, Reward], tmp_path: Path, kind: str
) -> None:
    again = load(configs[kind], name="again")
    assert again.version == scorers[kind].version and len(again.version) == 64
    path = Path(configs[kind].path)
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    key = max(tensors)
    copy = tmp_path / path.name
    if path.is_dir():
        import shutil

        shutil.copytree(path, copy)
    target = copy / file.name if path.is_dir() else copy
    save_file({**tensors, key: tensors[key] + 0.5}, target, metadata={"format": "pt"})
    assert load(configs[kind], path=str(copy)).version != scorers[kind].version


def test_units_differ_by_constant_factors_and_are_named(
    configs: dict[str, RewardCard], images: torch.Tensor
) -> None:
    for kind in ("clip", "hpsv2"):
        by_scale = {scale: load(configs[kind], scale=scale) for scale in ("raw", "percent", "logit")}
        scores = {scale: scorer.score(images, PROMPTS) for scale, scorer in by_scale.items()}
        torch.testing.assert_close(scores["percent"], 100 * scores["raw"])
        ratio = scores["logit"] / scores["raw"]
        torch.testing.assert_close(ratio, ratio[:1].expand(5))
        assert float(ratio[0]) > 1 and float(scores["raw"].abs().max()) <= 1
        assert len({scorer.scale for scorer in by_scale.values()}) == 3
        assert len({scorer.version for scorer in by_scale.values()}) == 3


def test_defaults_are_what_the_literature_prints(scorers: dict[str, Reward]) -> None:
    assert {kind: scorer.scale for kind, scorer in scorers.items()} == {
        "clip": "logit-scaled cosine",
        "pickscore": "logit-scaled cosine",
        "hpsv2": "100 x cosine (hpsv2)",
        "hpsv2.1": "100 x cosine (hpsv2.1)",
        "imagereward": "standardised reward, about -2 to 2",
        "aesthetic": "rating, about 1 to 10 (v2)",
    }


def test_hps_reads_entities_as_openclip_does(scorers: dict[str, Reward], images: torch.Tensor) -> None:
    assert clean_text(" cats &amp;amp; dogs ") == "cats & dogs"
    scores = [scorers["hpsv2"].score(images[:1], [text]) for text in ("a &amp; b", "a & b", "a &amp b c")]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_long_prompts_are_cut_and_counted(configs: dict[str, RewardCard], images: torch.Tensor) -> None:
    for kind, long in (("hpsv2", "x" * 40), ("imagereward", "cat " * 40)):
        scorer = load(configs[kind])
        scores = scorer.score(images[:1].expand(2, -1, -1, -1), [long, long + long])
        # Rows of a batch may lie in two threads' shares, which end differently: 100 roundings of 6e-8.
        assert torch.allclose(scores[0], scores[1], rtol=6e-6, atol=0) and scorer.num_cut_prompts == 2


def refuse(build: object, kind: type[DiffexpoError], match: str) -> None:
    with pytest.raises(kind, match=match):
        build()


def changed(file: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a weight file with tensors replaced, added or (None) left out; `__` stands for a dot."""
    tensors = load_file(file)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    target = folder / "changed.safetensors"
    save_file(tensors, target)
    return target


def test_pickled_files_are_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(b"not even a pickle")
    with pytest.raises(MissingError, match="is a pickled file, which is never read") as caught:
        HpsReward("hps", str(file), base="x")
    text = str(caught.value)
    assert "weights_only=True)['state_dict']" in text and "Apache-2.0" in text and "xswu/HPSv2" in text


def test_one_file_is_taken_from_a_folder(tmp_path: Path) -> None:
    refuse(lambda: find_weights("r", ImageRewardCard, None), MissingError, "no path to")
    refuse(
        lambda: find_weights("r", ImageRewardCard, str(tmp_path / "a.safetensors")), MissingError, "no file"
    )
    refuse(lambda: find_weights("r", ImageRewardCard, str(tmp_path)), MissingError, "holds 0 .safetensors")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    refuse(lambda: find_weights("r", ImageRewardCard, str(tmp_path)), MissingError, "holds 2 .safetensors")
    (tmp_path / "b.safetensors").unlink()
    assert find_weights("r", ImageRewardCard, str(tmp_path)) == tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "aesthetic", "clip"])
def test_damage_is_found_before_the_hub_is_asked(
    configs: dict[str, RewardCard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def ask(*arguments: object, **options: object) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(weights, "snapshot_download", ask)
    path = tmp_path / "weights"
    if name == "clip":
        shutil.copytree(configs["clip"].path, path)
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    else:
        path = path.with_suffix(".safetensors")
        path.write_bytes(Path(configs["hpsv2"].path).read_bytes()[:-50])
    config = read_card(name="r", type=name, path=str(path), base="some/base")
    refuse(lambda: load(config), RewardError, "damaged safetensors")


def test_hps_refuses_what_does_not_fit(configs: dict[str, RewardCard], tmp_path: Path) -> None:
    file, base = Path(configs["hpsv2"].path), configs["hpsv2"].base
    quick = (
        hps_checkpoint(tmp_path / "quick", activation="quick_gelu")
        if (tmp_path / "quick").mkdir() is None
        else ()
    )
    refuse(
        lambda: HpsReward("r", str(file), base=str(quick[1])), RewardError, "base has activation quick_gelu"
    )
    less = changed(file, tmp_path, ln_final__bias=None)
    refuse(lambda: HpsReward("r", str(less), base=base), RewardError, "lacks 1 HPS.*final_layer_norm.bias")
    more = changed(file, tmp_path, score_head__weight=torch.zeros(2))
    refuse(lambda: HpsReward("r", str(more), base=base), RewardError, "has 1 weights that HPS.*score_head")
    other = changed(file, tmp_path, visual__proj=torch.zeros(3, 3))
    refuse(lambda: HpsReward("r", str(other), base=base), RewardError, "lacks 1 HPS.*visual_projection")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-50])
    refuse(lambda: HpsReward("r", str(broken), base=base), RewardError, "damaged safetensors")
    (tmp_path / "empty").mkdir()
    refuse(
        lambda: HpsReward("r", str(file), base=str(tmp_path / "empty")),
        MissingError,
        "config.json is missing",
    )


def test_imagereward_refuses_what_does_not_fit(configs: dict[str, RewardCard], tmp_path: Path) -> None:
    file, base = Path(configs["imagereward"].path), configs["imagereward"].base

    def build(path: Path, tokenizer: str | None = None) -> ImageRewardScorer:
        return ImageRewardScorer("r", str(path), base=tokenizer or base)

    less = changed(file, tmp_path, mlp__layers__7__weight=None)
    refuse(lambda: build(less), RewardError, "lacks 1 ImageReward.*mlp.layers.7.weight")
    less = changed(file, tmp_path, blip__visual_encoder__norm__bias=None)
    refuse(lambda: build(less), RewardError, "lacks 1 ImageReward.*post_layernorm.bias")
    more = changed(file, tmp_path, blip__text_encoder__pooler__dense__bias=torch.zeros(2))
    refuse(lambda: build(more), RewardError, "has 1 weights that ImageReward.*pooler")
    (tmp_path / "med_config.json").write_text("{")
    refuse(lambda: build(changed(file, tmp_path)), RewardError, "not BLIP's text configuration")
    (tmp_path / "empty").mkdir()
    refuse(lambda: build(file, str(tmp_path / "empty")), MissingError, "holds no tokenizer")


def test_aesthetic_refuses_what_does_not_fit(configs: dict[str, RewardCard], tmp_path: Path) -> None:
    base = configs["aesthetic"].base

    def build(path: Path) -> AestheticReward:
        return AestheticReward("r", str(path), base=base)

    wide = aesthetic_checkpoint(tmp_path, WIDTH + 1, 2)
    refuse(lambda: build(wide), RewardError, f"length {WIDTH + 1}, but the image vectors .* length {WIDTH}")
    with_relu = {"layers.0.weight": torch.zeros(4, WIDTH), "layers.3.weight": torch.zeros(1, 4)}
    save_file(with_relu, tmp_path / "relu.safetensors")
    refuse(lambda: build(tmp_path / "relu.safetensors"), RewardError, "the ReLU head is another model")
    apart = changed(aesthetic_checkpoint(tmp_path, WIDTH, 2), tmp_path, layers__4__weight=torch.zeros(5, 5))
    refuse(lambda: build(apart), RewardError, "do not follow one another")


def test_pickscore_needs_its_processor(configs: dict[str, RewardCard], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(
        lambda: ClipReward("r", str(configs["clip"].path), base=str(tmp_path / "empty")),
        MissingError,
        "preprocessor_config.json is missing",
    )
