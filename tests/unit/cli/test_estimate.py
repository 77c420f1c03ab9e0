"""`diffexpo estimate` and the plan of `--dry-run`: from settings alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from diffexpo.assembly.runs import plan
from diffexpo.config import RunConfig, load_config
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.estimate.advice import Change
from diffexpo.estimate.resources import advise, disk_items, estimate
from tests.unit.cli.test_main import call

GIB = 2**30


def config(*recipes: str, sets: tuple[str, ...] = ()) -> RunConfig:
    return load_config(recipes, sets, {}).config


def sizes(found: RunConfig, phase: str) -> dict[str, int]:
    return {item.what: item.bytes for item in estimate(found).memory if item.phase == phase}


def test_full_tuning_counts_every_copy_and_the_optimiser() -> None:
    parameters = 5_379_976
    found = config("emoji/expo", sets=("training.ema_decay=0.9",))
    always, train = sizes(found, "always"), sizes(found, "train")
    # The network itself is "current"; "base" and "main" are copies.
    assert always["unet"] == 4 * parameters and always["copies of the denoiser"] == 8 * parameters
    assert train["gradients"] == train["moving average"] == 4 * parameters
    assert train["AdamW moments"] == 8 * parameters
    assert "moving average" not in sizes(config("emoji/expo", sets=("training.ema_decay=0",)), "train")


def test_a_moving_reference_and_an_old_policy_are_copies_too() -> None:
    base = sizes(config("emoji/expo_lora"), "always")["adapters"]
    previous = sizes(config("emoji/expo_lora", sets=("algorithm.reference=previous",)), "always")["adapters"]
    old = sizes(config("emoji/diffusion_nft", sets=("tuning.kind=lora",)), "always")["adapters"]
    assert (previous, old) == (base * 3 // 2, base * 3 // 2)


HALF = ("training.mixed_precision=bf16", "tuning.reference_dtype=bfloat16")


def test_a_reference_in_half_precision_takes_half_and_the_base_none() -> None:
    parameters, whole = 5_379_976, sizes(config("emoji/expo", sets=HALF[:1]), "always")
    assert whole["copies of the denoiser"] == 2 * 4 * parameters
    half = sizes(config("emoji/expo", sets=HALF), "always")
    assert half["copies of the denoiser"] == 4 * parameters  # "main" alone
    # Norms stay in float32, and nothing else of this network does.
    assert 2 * parameters < half["reference"] < 2.02 * parameters
    # The base comes back to draw in its evaluation.
    assert sizes(config("emoji/expo", sets=HALF), "draw")["a copy moved in"] == 4 * parameters


def test_parked_copies_count_while_they_run() -> None:
    parameters, parked = 5_379_976, ("tuning.reference_device=cpu",)
    plain, found = config("emoji/expo"), config("emoji/expo", sets=parked)
    assert sum(sizes(plain, "always").values()) - sum(sizes(found, "always").values()) == 8 * parameters
    assert sizes(found, "decode")["a copy moved in"] == 4 * parameters
    grown = [sizes(one, "train")["activations, training"] for one in (plain, found)]
    # At most a float32 copy beside the held activations; less where the backward pass is the peak.
    assert 0 <= grown[1] - grown[0] <= 4 * parameters
    assert estimate(found).total < estimate(plain).total


def test_merged_weights_count_while_they_draw() -> None:
    found = config("emoji/expo_lora", sets=("explore.merge_lora=true",))
    extra = estimate(found).as_json()["memory"], estimate(config("emoji/expo_lora")).as_json()["memory"]
    (item,) = [item for item in extra[0] if item not in extra[1]]
    assert (item["what"], item["phase"]) == ("merged weights", "draw")
    unet = sizes(found, "always")["unet"]
    assert 0 < item["bytes"] < unet and item["bytes"] % 4 == 0


def test_drawing_counts_two_rows_for_guidance_and_one_image_for_slices() -> None:
    plain = config("emoji/expo", sets=("explore.sampler.guidance=1.0", "evaluation.sampler.guidance=1.0"))
    guided = config("emoji/expo", sets=("explore.sampler.guidance=5.0", "evaluation.sampler.guidance=5.0"))
    rows = [sizes(found, "draw")["activations, drawing"] for found in (plain, guided)]
    assert rows[1] == 2 * rows[0] > 0
    images = guided.explore.batch_size
    whole = sizes(guided, "decode")["activations, decoding"]
    sliced = sizes(config("emoji/expo", sets=("model.vae_slicing=true",)), "decode")["activations, decoding"]
    assert images > 1 and sliced == whole // images + images * 4 * 3 * 64 * 64


def test_drawing_in_half_precision_takes_less() -> None:
    plain, half = (config("emoji/expo", sets=sets) for sets in ((), ("model.inference_precision=bf16",)))
    drawn = [sizes(one, "draw")["activations, drawing"] for one in (plain, half)]
    assert 0 < drawn[1] < drawn[0]
    assert sizes(half, "always") == sizes(plain, "always")
    assert estimate(half).cost.checks > estimate(plain).cost.checks


def test_advice_for_full_tuning_makes_the_copies_smaller_before_it_gives_up() -> None:
    found = config("emoji/expo", sets=SMALL)
    needed = estimate(found)
    # A card that is too small by a little less than a copy.
    card = (needed.total - 2 * 5_379_976 + 0.6 * GIB) / 0.92 / GIB
    (advice,) = advise(found, cards=(card,))
    chosen = [setting for change in advice.changes or () for setting in change.settings]
    assert "tuning.reference_dtype=bfloat16" in chosen or "tuning.reference_device=cpu" in chosen
    assert estimate(config("emoji/expo", sets=(*SMALL, *chosen))).total == advice.total
    # What already has small copies is told to leave them when adapters take their place.
    (advice,) = advise(config("emoji/expo", sets=(*SMALL, *HALF)), cards=(0.9,))
    for change in advice.changes or ():
        if "tuning.kind=lora" in change.settings:
            assert "tuning.reference_dtype=float32" in change.settings


SMALL = ("training.micro_batch_size=1", "explore.batch_size=1", "model.vae_slicing=true")


def test_two_passes_hold_half_of_the_activations() -> None:
    joint = sizes(config("emoji/expo_lora"), "train")["activations, training"]
    halves = sizes(config("emoji/expo_lora", sets=("training.pair_gradient=two_pass",)), "train")
    assert 0.4 * joint < halves["activations, training"] < 0.6 * joint


def test_activations_are_those_of_the_largest_size() -> None:
    several = config("emoji/expo", sets=("model.buckets=[[48, 80], [96, 96]]",))
    large = config("emoji/expo", sets=("model.resolution=96",))
    assert sizes(several, "train") == sizes(large, "train") != sizes(config("emoji/expo"), "train")
    assert dict(plan(several))["sizes"].startswith("64x64, 48x80, 96x96 (height x width); drawn at the first")
    assert "sizes" not in dict(plan(large))


def test_disk_counts_latents_iterates_and_pictures() -> None:
    found = config("emoji/expo", sets=("offline.limit=100",))
    items = {item.what: item.bytes for item in disk_items(found)}
    latent = 4 * 8 * 8 * 8
    images = 2 * 192 * 8
    assert items["latents and rows of drawn images"] == images * (latent + 1024)
    assert items["offline pairs"] == 100 * (2 * (latent + 1024) + 1024)
    assert items["iterates"] == 3 * 4 * 5_379_976


def test_the_command_prints_what_the_function_counts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "estimate", "emoji/expo_lora", "--json", "--no-advice")
    found = json.loads(out)
    expected = estimate(config("emoji/expo_lora"))
    assert code == 0
    assert (found["total"], found["on_disk"]) == (expected.total, expected.on_disk)
    assert found["cost"]["total"] == expected.cost.total
    code, out, _ = call(capsys, "estimate", "emoji/expo_lora", "--no-advice")
    assert code == 0 and f"largest at once {expected.total / GIB:.2f} GiB" in out


def test_a_model_that_nobody_knows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("estimate", "emoji/expo", "--no-advice", "--set", "model.path=somebody/a-model")
    code, _, err = call(capsys, *arguments)
    assert code == 3 and "--architecture" in err
    assert "sd35-medium" in err and "flux1-dev" in err
    found = config("emoji/expo", sets=("model.path=somebody/a-model", "tuning.kind=lora"))
    latents = next(item for item in disk_items(found, architecture="sd15") if "latents" in item.what)
    assert latents.bytes == 2 * 192 * 8 * (4 * 4 * 64 * 64 + 1024)


def test_advice_is_what_makes_it_fit_and_nothing_more() -> None:
    card = 1.0
    assert not estimate(config("emoji/expo_lora")).fits(card)
    (advice,) = advise(config("emoji/expo_lora"), cards=(card,))
    assert advice.gib == card and advice.changes

    def settings(changes: Sequence[Change]) -> tuple[str, ...]:
        return tuple(setting for change in changes for setting in change.settings)

    fitted = estimate(config("emoji/expo_lora", sets=settings(advice.changes)))
    assert fitted.fits(card) and fitted.total == advice.total
    for left_out in advice.changes:
        others = settings([change for change in advice.changes if change is not left_out])
        assert not estimate(config("emoji/expo_lora", sets=others)).fits(card)


def test_advice_says_when_nothing_helps_or_is_needed() -> None:
    found = advise(config("emoji/expo_lora"), cards=(0.5, 80))
    assert found[0].changes is None and found[1].changes == ()


def test_the_plan_says_what_trains_nothing_and_no_tau_without_negatives() -> None:
    rows = dict(plan(config("emoji/diffusion_nft")))
    assert rows["train-1"].startswith("nothing")
    assert rows["train-2"].startswith("12 steps")
    assert "tau" not in rows["collect-1"] and "GiB" in rows["disk"]
    rows = dict(plan(config("emoji/expo")))
    assert rows["train-1"].startswith("20 steps") or "steps x" in rows["train-1"]
    assert "tau 0." in rows["collect-1"]
    assert dict(plan(config("emoji/expo", sets=("model.path=somebody/a-model",))))["disk"].startswith(
        "not known"
    )


def test_estimating_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(PromptEmbeddings, "add", refuse)
    assert estimate(config("emoji/expo_flow")).total > 0
