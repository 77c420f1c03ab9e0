"""What a run reads stays the same while it goes on, and an iterate of a run is a base model for another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import diffexpo
from diffexpo.assembly.inputs import check_inputs_unchanged
from diffexpo.config import RunConfig, load_config
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.rewards import REWARDS
from diffexpo.data.identity import ALWAYS_READ, Identity, accepted_changes, describe_files, read_identity
from diffexpo.errors import MissingError, ResumeError
from diffexpo.training.distributed import World
from tests.commands import command
from tests.commands import diffexpo as succeed
from tests.tiny import tiny_judge

SETS = ["explore.iterations=2", "training.steps=2", "evaluation.kl_prompts=0", "evaluation.bootstrap=20"]
LORA = ["tuning.kind=lora", "tuning.lora.rank=2", "tuning.lora.alpha=3"]
PAIRS = "offline.parquet"


@dataclass
class Begun:
    """A run that has made something, and the files that it reads, which can be changed."""

    config: RunConfig
    folder: Path
    run_dir: Path

    def check(self, config: RunConfig | None = None, **options: Any) -> None:
        check_inputs_unchanged(config or self.config, self.run_dir, World(), **options)

    def changes(self, config: RunConfig | None = None) -> str:
        """What the run is refused with."""
        with pytest.raises(ResumeError) as refused:
            self.check(config)
        return str(refused.value)


@pytest.fixture
def begun(world: Path, tmp_path: Path) -> Begun:
    folder, run_dir = tmp_path / "world", tmp_path / "run"
    shutil.copytree(world, folder)
    tiny_judge(folder / "judge")
    (folder / "helper.py").write_text("FACTOR = 2\n")
    (folder / "rewards.py").write_text("import helper\n" + (folder / "rewards.py").read_text())
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace(str(world), str(folder)))
    judge = '{"name": "clip", "type": "clip", "path": "%s"}' % (folder / "judge")
    config = load_config([folder / "recipe.yaml"], [f"evaluation.judges=[{judge}]"]).config
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "contenders" / "other").mkdir(parents=True)
    (run_dir / "contenders" / "other" / "config.yaml").write_text("seed: 1\n")
    found = Begun(config, folder, run_dir)
    found.check()
    (run_dir / "checkpoints" / "step").touch()  # what has made something is bound to its inputs
    found.check()
    return found


def edit(path: Path) -> None:
    """Another content of the same length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = {
    **dict.fromkeys(
        [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "scheduler/scheduler_config.json",
        ],
        "model.path",
    ),
    "prompts.txt": "prompts.source",
    "heldout.txt": "evaluation.prompts",
    "negatives.txt": "explore.negatives.source",
    "rewards.py": "rewards.0.path",
    "helper.py": "rewards.0.path",
    "judge/config.json": "evaluation.judges.0.path",
    "judge/model.safetensors": "evaluation.judges.0.path",
    "judge/tokenizer.json": "evaluation.judges.0.path",
    "judge/preprocessor_config.json": "evaluation.judges.0.path",
    PAIRS: "offline.source",
}


def place(name: str, setting: str, folder: Path) -> Path:
    return folder / ("model/" if setting == "model.path" else "") / name


@pytest.mark.parametrize(("name", "setting"), FILES.items())
def test_one_changed_bit_of_any_input_is_named(name: str, setting: str, begun: Begun) -> None:
    file = place(name, setting, begun.folder)
    before = file.read_bytes()
    edit(file)
    said = begun.changes()
    assert f"{setting} = " in said and "--accept-changes" in said
    # The settings and the code stay as they were, so nothing else is named.
    assert said.count("is not what this run began with") == 1
    assert (begun.folder / name).name in said or name == "helper.py" or setting == "model.path"
    file.write_bytes(before)
    begun.check()


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"]
)
def test_a_part_of_the_model_that_is_gone_or_new_is_named(name: str, begun: Begun) -> None:
    file = begun.folder / "model" / name
    data = file.read_bytes()
    file.unlink()
    assert f"{file} is not what this run began with" in (said := begun.changes()) and "now gone" in said
    file.write_bytes(data)
    begun.check()
    extra = file.parent / "added_tokens.json"
    extra.write_text("{}")
    assert f"{extra} is not what this run began with (not there" in begun.changes()


@pytest.mark.parametrize("name", ["prompts.txt", "heldout.txt", "negatives.txt"])
def test_a_remark_in_a_list_of_prompts_is_no_change(name: str, begun: Begun) -> None:
    text = (begun.folder / name).read_text()
    (begun.folder / name).write_text(f"# a remark\n\n{text}")
    begun.check()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed=8", "the setting seed is not what this run began with (7, now 8)"),
        ("training.steps=7", "the setting training.steps is not what this run began with (6, now 7)"),
        ("rewards.1.weight=0.25", "rewards.1.weight is not what this run began with (0.5, now 0.25)"),
        ("offline.limit=3", "offline.limit"),
        ("algorithm={type: diffusion_dpo}", "algorithm.type is not what this run began with (expo, now"),
    ],
)
def test_an_edited_setting_is_named_with_both_values(setting: str, told: str, begun: Begun) -> None:
    judges = begun.config.model_dump(mode="json")["evaluation"]["judges"]
    sets = [f"evaluation.judges={json.dumps(judges)}", setting]
    assert told in begun.changes(load_config([begun.folder / "recipe.yaml"], sets).config)


def test_a_setting_of_memory_alone_may_change(begun: Begun) -> None:
    training = begun.config.training.model_copy(update={"micro_batch_size": 1})
    begun.check(begun.config.model_copy(update={"training": training}))
    begun.check()


def test_other_code_is_named(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffexpo.assembly.inputs.code_fingerprint", lambda: "0123456789ab")
    assert "the code of diffexpo is not what this run began with" in begun.changes()


def test_the_settings_of_a_contender_are_the_runs_own(begun: Begun) -> None:
    (begun.run_dir / "contenders" / "other" / "config.yaml").write_text("seed: 2\n")
    assert "contenders/other/config.yaml = " in begun.changes()


def test_accepted_changes_are_recorded_and_told_in_the_report(begun: Begun) -> None:
    edit(begun.folder / "prompts.txt")
    told: list[str] = []
    begun.check(accepts=True, tell=told.append)
    assert len(told) == 1 and "prompts.source" in told[0]
    begun.check()  # it is what the run goes on with now
    known = read_identity(begun.run_dir)
    assert known is not None and [one["after"] for one in known.accepted] == ["nothing"]
    assert "prompts.source" in accepted_changes(begun.run_dir)[0]
    edit(begun.folder / "heldout.txt")
    begun.check(accepts=True)
    assert len(accepted_changes(begun.run_dir)) == 2


@pytest.mark.parametrize("damage", [edit, lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_a_damaged_record_is_refused_and_can_be_made_anew(
    damage: Callable[[Path], object], begun: Begun
) -> None:
    damage(begun.run_dir / "inputs.json")
    assert "inputs.json is damaged" in begun.changes()
    begun.check(accepts=True)
    begun.check()
    assert "inputs.json" in accepted_changes(begun.run_dir)[0]


def test_every_bit_of_the_record_is_checked(begun: Begun) -> None:
    path, generator = begun.run_dir / "inputs.json", np.random.default_rng(0)
    data = path.read_bytes()
    for place in generator.integers(0, len(data), 200):
        changed = bytearray(data)
        changed[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(changed)
        try:
            assert read_identity(begun.run_dir) == read_identity_of(data, begun.run_dir), "white space alone"
        except ResumeError:
            continue


def read_identity_of(data: bytes, run_dir: Path) -> Identity | None:
    """What a sound record says."""
    beside = run_dir / "sound"
    beside.mkdir(exist_ok=True)
    (beside / "inputs.json").write_bytes(data)
    return read_identity(beside)


def test_a_record_that_is_gone_is_told(begun: Begun) -> None:
    (begun.run_dir / "inputs.json").unlink()
    told: list[str] = []
    begun.check(tell=told.append)
    assert len(told) == 1 and "no record" in told[0]


def test_the_record_of_an_early_version_still_binds(begun: Begun) -> None:
    known = read_identity(begun.run_dir)
    assert known is not None
    early = {
        name: {"file": one.file, "sha256": one.sha256}
        for name, one in known.inputs.items()
        if name in ("prompts.source", "rewards.0.path")
    } | {"model.path": {"file": "model", "sha256": "of other things"}}
    (begun.run_dir / "inputs.json").write_text(json.dumps(early))
    edit(begun.folder / "prompts.txt")
    assert "prompts.source" in begun.changes()
    edit(begun.folder / "prompts.txt")
    begun.check()
    edit(begun.folder / "model" / "vae" / "config.json")
    assert "model.path" in begun.changes(), "the rest is recorded now"


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reads = tmp_path / "large", []
    file.write_bytes(bytes(2 * ALWAYS_READ))
    monkeypatch.setattr("diffexpo.files.sha256_of", lambda path: reads.append(path) or "digest")
    first = describe_files([file])
    assert describe_files([file], first) == first and len(reads) == 1
    stat = file.stat()
    file.write_bytes(b"1" + bytes(2 * ALWAYS_READ - 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does
    describe_files([file], first)
    assert len(reads) == 2


def test_no_setting_that_names_a_file_is_forgotten() -> None:
    """Settings that are text either name an input or are known not to."""
    paths = {"path", "base", "source", "prompts", "judge", "start", "offline_source", "contenders"}
    words = {
        "name",
        "device",
        "revision",
        "variant",
        "by",
        "cache",
        "consent",
        "api_key_env",
        "scorer",
        "version",
    }
    words |= {
        "target",
        "values",
        "model",
        "question",
        "text_encoder",
        "project",
        "target_modules",
        "sha256",
        "buckets",
    }
    found = set().union(
        *(text_fields(kind) for kind in (RunConfig, *METHOD_BY_NAME.values(), *REWARDS.values()))
    )
    assert found <= paths | words, found - paths - words


def text_fields(kind: type[BaseModel]) -> set[str]:
    """Names of the fields, at any depth, that may hold any text."""
    found = set()
    for name, info in kind.model_fields.items():
        inner = [one for one in (info.annotation, *get_args(info.annotation)) if isinstance(one, type)]
        groups = [one for one in inner if issubclass(one, BaseModel)]
        for group in groups:
            found |= text_fields(group)
        if not groups and "str" in str(info.annotation):
            found.add(name)
    return found


def test_a_stopped_run_does_not_go_on_with_other_prompts_or_settings(begun: Begun, tmp_path: Path) -> None:
    folder = begun.folder
    shutil.rmtree(tmp_path / "run")
    sets = [part for setting in [*SETS, "offline.source=null"] for part in ("--set", setting)]
    begin = ("run", folder / "recipe.yaml", "--out", tmp_path / "run", *sets, "--stop-after", "collect-1")
    assert command(*begin).code == 0
    (folder / "prompts.txt").write_text("something else\n")
    done = command("run", "--resume", tmp_path / "run")
    assert (
        done.code == 4 and "prompts.source" in done.message and "is not what this run began with" in done.err
    )
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    done = command("run", "--resume", tmp_path / "run")
    assert (
        done.code == 4
        and "training.learning_rate is not what this run began with (0.001, now 0.002)" in done.err
    )
    done = command("run", "--resume", tmp_path / "run", "--accept-changes", "--stop-after", "pair-1")
    assert done.code == 0 and "prompts.source" in done.out and "training.learning_rate" in done.out
    assert len(accepted_changes(tmp_path / "run")) == 2
    with pytest.raises(ResumeError, match="seed"):
        settings.write_text(settings.read_text().replace("seed: 7", "seed: 8"))
        diffexpo.run(resume=tmp_path / "run", quiet=True)


def test_an_iterate_is_the_base_of_another_run(world: Path, tmp_path: Path) -> None:
    sets = [part for setting in [*SETS, *LORA] for part in ("--set", setting)]
    succeed(
        "run",
        world / "recipe.yaml",
        "--out",
        tmp_path / "first",
        *sets,
        "--set",
        "training.learning_rate=1e-2",
    )
    base = f"{tmp_path / 'first'}@2"
    settings = [f"model.path={base}", "explore.iterations=1", "algorithm={type: diffusion_dpo, beta: 200.0}"]
    more = [part for setting in settings for part in ("--set", setting)]
    planned = succeed("run", world / "recipe.yaml", "--out", tmp_path / "second", *sets, *more, "--dry-run")
    whole = tmp_path / "first" / "export" / "iteration-2" / "whole"
    assert "nothing was run" in planned.out and not whole.exists()
    succeed(
        "run", world / "recipe.yaml", "--out", tmp_path / "second", *sets, *more, "--stop-after", "train-1"
    )
    assert (whole / "model_index.json").is_file()
    # The whole model predicts what the base predicts with the iterate's adapters.
    iterate, second = diffexpo.open_run(base).policy(), diffexpo.load_policy(base, device="cpu")
    x, t = torch.randn(1, *iterate.latent_shape), torch.tensor([0.5])
    with torch.no_grad(), iterate.weights.use("current"):
        expected = iterate.predict(x, t, iterate.encode_prompts(["thing 1"]))
    with torch.no_grad(), second.weights.use("base"):
        found = second.predict(x, t, second.encode_prompts(["thing 1"]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), iterate.weights.use("base"):
        assert not torch.allclose(
            found, iterate.predict(x, t, iterate.encode_prompts(["thing 1"])), atol=1e-4
        )
    done = command("run", world / "recipe.yaml", "--set", f"model.path={tmp_path / 'first'}@7", "--dry-run")
    assert done.code == MissingError.exit_code and "has no iterate 7; it has trained 1, 2" in done.message
