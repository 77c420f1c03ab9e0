"""The cards of the model families: every one has its code, its papers and whole descriptions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import diffexpo
from diffexpo.config.families import FAMILIES, checkpoints, family_of_name, find_checkpoint
from diffexpo.config.families.card import Family
from diffexpo.config.papers import WORKS

ROOT = Path(diffexpo.__file__).parent


@pytest.mark.parametrize("card", FAMILIES.values(), ids=lambda card: card.name)
def test_a_family_is_a_card_and_code_of_one_name(card: Family) -> None:
    for room in ("config/families", "policies"):
        assert (ROOT / room / f"{card.name}.py").is_file()
    assert set(card.works()) <= set(WORKS) and card.papers
    assert card.parts.keys() == {*card.text_encoders, card.denoiser[0], "vae"}
    assert all(known.licence and known.parameters for known in card.checkpoints)


def test_no_other_family_has_a_card_file() -> None:
    files = {file.stem for file in (ROOT / "config" / "families").glob("*.py")}
    assert files - {"__init__", "card"} == {card.name for card in FAMILIES.values()}


@pytest.mark.parametrize("name", checkpoints())
def test_a_checkpoints_name_tells_its_family(name: str) -> None:
    family, known = checkpoints()[name]
    assert find_checkpoint(name) == (family, known) and family_of_name(name) is family


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("stabilityai/stable-diffusion-3.5-large", "sd3"),
        ("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", "sana"),
        ("susana/sdxl-finetune", "sdxl"),
        ("somebody/a-model", None),
    ],
)
def test_families_are_known_by_name_without_a_published_size(path: str, family: str | None) -> None:
    found = family_of_name(path)
    assert (found.name if found else None) == family


def test_inert_parameters_follow_from_the_configuration() -> None:
    sd3, sana = FAMILIES["StableDiffusion3Pipeline"], FAMILIES["SanaPipeline"]
    names = [f"transformer_blocks.{block}.attn.add_q_proj.weight" for block in range(3)]
    assert sd3.inert_parameters({"num_layers": 3}, names) == (names[2],)
    names = ["blocks.0.attn2.to_k.bias", "blocks.0.attn1.to_k.bias", "blocks.0.attn2.to_k.weight"]
    assert sana.inert_parameters({"qk_norm": None}, names) == (names[0],)
    assert sana.inert_parameters({"qk_norm": "rms_norm_across_heads"}, names) == ()


def test_only_later_versions_cite_the_later_paper() -> None:
    sana = FAMILIES["SanaPipeline"]
    assert sana.works("Sana_600M_1024px") == ("xie2024sana",)
    assert sana.works("SANA1.5_1.6B_1024px") == ("xie2024sana", "xie2025sana15")


def test_cards_load_without_torch() -> None:
    code = "import sys, diffexpo.config.families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
