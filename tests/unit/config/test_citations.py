"""What a run cites follows from its settings; entries are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from diffexpo.config import RunConfig, load_config
from diffexpo.config.citations import SAMPLERS, citations
from diffexpo.config.methods import METHOD_BY_NAME, METHODS
from diffexpo.config.methods.diffusion_dpo import KINDS
from diffexpo.config.papers import WORKS
from diffexpo.config.rewards import read_card
from diffexpo.config.schema import OfflineConfig

ROOT = Path(__file__).resolve().parents[3]


def used(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Key of each cited work and what it was used for."""
    return {one.work.key: one.purposes for one in citations(config).known}


def loaded(recipe: str, *changes: str) -> RunConfig:
    return load_config([recipe], changes, {}).config


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings.model_fields["type"].default)
def test_every_method_has_a_name_and_the_papers_that_its_docstring_names(settings):
    method = settings()
    config = RunConfig().model_copy(update={"algorithm": method})
    purpose = f"method {method.title}"
    cited = [one.work for one in citations(config).known if purpose in one.purposes]
    assert cited or method.type == "python"  # a loss of one's own is nobody's work
    named = set(re.findall(r"\d{4}\.\d{5}", settings.__doc__ or ""))
    assert named <= {work.arxiv for work in cited}


def test_names_are_those_of_methods_and_all_different():
    assert len({method.title for method in METHODS}) == len(METHODS)
    assert METHOD_BY_NAME["ddpo"].title == "DDPO"


def test_expo_cites_its_paper_first_and_the_software_last():
    found = citations(loaded("emoji/expo")).known
    assert found[0].work.title == "Aligning Diffusion Models with Online Preference Learning"
    assert found[-1].work.key == "diffexpo"
    keys = [one.work.key for one in found]
    assert len(keys) == len(set(keys))
    assert {"wallace2024diffusiondpo", "xiong2024iterative", "lu2022dpmsolverpp", "rombach2022ldm"} <= set(
        keys
    )
    assert {"radford2021clip", "noto_emoji", "twemoji", "cldr", "friedman2023vendi"} <= set(keys)
    assert "method EXPO" in used(loaded("emoji/expo"))["wallace2024diffusiondpo"]


@pytest.mark.parametrize(
    ("recipe", "changes", "key"),
    [
        ("emoji/expo", ("algorithm.alpha=0.1",), "chen2025sepopo"),
        ("emoji/expo", ("algorithm.safeguard=true",), "fu2025sdpo"),
        ("emoji/expo", ("algorithm.auto_beta=true",), "simpletuner"),
        ("emoji/expo", ("algorithm.anchor_weight=0.01", "algorithm.anchor_guidance=2"), "zhu2026crd"),
        ("emoji/expo", ("algorithm.reference=previous", "algorithm.reference_budget=0.01"), "he2025gardo"),
        ("emoji/expo", ("algorithm.reference=ema", "algorithm.reference_follows=step"), "li2026lineardpo"),
        ("emoji/expo", ("evaluation.sampler.guidance=4",), "ho2022guidance"),
        ("emoji/expo_lora", (), "hu2021lora"),
        ("emoji/expo_flow", (), "esser2024sd3"),
        ("emoji/expo_multi", ("mixture.kind=pareto",), "yang2024d3po"),
        ("emoji/raft", (), "dong2023raft"),
        ("emoji/ddpo", (), "schulman2017ppo"),
        ("emoji/ddpo_compressibility", (), "black2024ddpo"),
        ("emoji/flow_grpo", ("algorithm.window=2",), "li2025mixgrpo"),
        ("emoji/flow_grpo", ("algorithm.ratio=guard",), "wang2025grpoguard"),
        ("emoji/flow_grpo", ("explore.sampler.sde=dance",), "xue2025dancegrpo"),
        ("emoji/flow_grpo", ("explore.sampler.sde=cps", "algorithm.kl=exact"), "wang2025cps"),
        ("paper/expo_ii_sd15", (), "kirstain2023pickapic"),
        ("paper/expo_ii_sd15", (), "ho2020ddpm"),
    ],
)
def test_an_option_is_cited_if_and_only_if_it_is_used(recipe, changes, key):
    assert key in used(loaded(recipe, *changes))
    if changes:
        assert key not in used(loaded(recipe))


@pytest.mark.parametrize(("kind", "key"), KINDS.items())
def test_losses_of_other_papers_are_cited(kind, key):
    assert used(loaded("emoji/dpo_offline", f"algorithm.kind={kind}"))[key] == (f"loss {kind}",)


def test_each_sampler_is_cited_with_its_place():
    config = loaded("emoji/ddpo")
    assert used(config)["song2020ddim"] == ("sampler of the collection",)
    assert used(config)["lu2022dpmsolverpp"] == ("sampler of the evaluation",)
    offline = used(loaded("emoji/dpo_offline"))
    assert all("sampler of the collection" not in purposes for purposes in offline.values())
    assert set(SAMPLERS.values()) <= set(WORKS)


def test_works_of_contenders_are_cited_as_long_as_they_are_there():
    config = loaded("emoji/expo", "baseline.contenders=[emoji/sft, runs/gone]")
    assert "contender sft: method SFT" in used(config)["ho2020ddpm"]
    assert not any("gone" in purpose for purposes in used(config).values() for purpose in purposes)


def test_supervised_training_is_cited_as_the_models_own_loss():
    assert "method SFT" in used(loaded("emoji/sft"))["ho2020ddpm"]
    flow = loaded("emoji/sft", "model.path=emoji:flow", "evaluation.sampler.name=flow_euler")
    assert "method SFT" in used(flow)["liu2022rectifiedflow"] and "ho2020ddpm" not in used(flow)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "rombach2022ldm"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "podell2023sdxl"),
        ("stabilityai/stable-diffusion-3.5-medium", "esser2024sd3"),
        ("black-forest-labs/FLUX.1-dev", "flux2024"),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "chen2024pixartsigma"),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "chen2023pixartalpha"),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "xie2024sana"),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "xie2025sana15"),
    ],
)
def test_models_are_known_by_name(path, key):
    assert used(loaded("emoji/expo", f"model.path={path}"))[key] == (f"model {path}",)


@pytest.mark.parametrize(
    ("pipeline", "key"),
    [("StableDiffusionPipeline", "rombach2022ldm"), ("StableDiffusion3Pipeline", "esser2024sd3")],
)
def test_a_folder_says_what_pipeline_it_holds(tmp_path, pipeline, key):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    config = RunConfig().model_copy(
        update={"model": RunConfig().model.model_copy(update={"path": str(tmp_path)})}
    )
    assert used(config)[key] == (f"model {tmp_path}",)
    (tmp_path / "model_index.json").write_text("[broken")
    assert citations(config).unknown[0] == f"model {tmp_path}"


def test_what_nobody_knows_is_listed_by_name():
    mine = read_card(name="mine", type="python", path="warm.py:score")
    config = RunConfig().model_copy(update={"rewards": (mine,)})
    assert "reward mine (python warm.py:score)" in citations(config).unknown
    assert "reward mine (python warm.py:score): not known here" in citations(config).as_text()
    unknown = citations(loaded("paper/expo_ii_sd15")).unknown
    assert "prompts data/pickapic_train_prompts.txt" in unknown


FORMATS = {
    "auto": "kirstain2023pickapic",
    "pickapic": "kirstain2023pickapic",
    "hpdv2": "wu2023hpsv2",
    "hpdv3": "ma2025hpsv3",
    "imagerewarddb": "xu2023imagereward",
}


@pytest.mark.parametrize("name", get_args(OfflineConfig.model_fields["format"].annotation))
def test_every_format_of_offline_pairs_is_cited_or_said_to_be_unknown(name):
    """Layouts that belong to nobody's data set leave the reference to their user."""
    found = citations(loaded("emoji/expo", "offline.source=pairs", f"offline.format={name}"))
    known = {
        one.work.key for one in found.known if "data or layout of the offline pairs pairs" in one.purposes
    }
    assert known == ({FORMATS[name]} if name in FORMATS else set())
    assert ("offline pairs pairs" in found.unknown) == (name not in FORMATS)
    assert set(FORMATS) <= set(get_args(OfflineConfig.model_fields["format"].annotation))


def test_the_package_is_cited_as_its_citation_file_says():
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    work = WORKS["diffexpo"]
    assert work.title == stated["title"]
    assert work.authors.strip("{}") == stated["authors"][0]["name"]
    assert work.note == f"version {stated['version']}"
