"""A loss from a user's file: the same as ours where it says the same, and told by name where it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diffexpo.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffexpo.algorithms.python import Python, own_pair_loss
from diffexpo.config import config_to_yaml, load_config, read_resolved
from diffexpo.config.methods.python import PythonConfig
from diffexpo.config.own_code import digest_of, files_of, load_function
from diffexpo.errors import ConfigError, MissingError, ResumeError, TrainingError
from diffexpo.evaluation.wording import describe_method
from tests import own_losses
from tests.commands import ROOT
from tests.unit.algorithms.methods import KEY, make, make_batch, make_policy

FILE = ROOT / "tests" / "own_losses.py"


def errors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    winner, loser = (
        torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    return winner, loser, *(torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))


def test_dpo_from_a_file_is_dpo() -> None:
    four = errors()
    ours, own = diffusion_dpo_loss(*four, beta=30.0), own_pair_loss(own_losses.dpo, *four)
    torch.testing.assert_close(own, ours, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss.sum(), four[:2]) for loss in (ours, own)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
    policy = make_policy()
    batch = make_batch("python", policy)
    both = [make(name, policy).loss(policy, batch, KEY) for name in ("diffusion_dpo", "python")]
    torch.testing.assert_close(both[0].loss, both[1].loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"mean returned \(\) for 5 pairs; expected a tensor with the loss of each pair"),
        ("detached", "detached does not depend on winner and loser"),
        ("wrong", r"wrong raised KeyError: 'no such thing' \(line \d+ of own_losses.py\)"),
    ],
)
def test_what_is_no_loss_is_told(name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        own_pair_loss(vars(own_losses)[name], *errors(), name=name)


def test_a_loss_is_named_and_hashed_and_a_run_goes_on_with_it_alone(tmp_path: Path) -> None:
    mine = shutil.copy(FILE, tmp_path / "mine.py")
    loaded = load_config(["scenes/quick"], [f"algorithm={{type: python, path: '{mine}:dpo'}}"], {})
    assert loaded.config.algorithm.sha256 == digest_of(Path(mine))
    assert loaded.config.algorithm.title == "dpo (own loss)"
    dumped = loaded.config.model_dump(mode="json")
    assert describe_method(dumped).label("iteration-2") == "dpo (own loss) 2"
    (tmp_path / "config.yaml").write_text(config_to_yaml(loaded.config))
    assert read_resolved(tmp_path / "config.yaml").config == loaded.config
    Python(loaded.config.algorithm)
    Path(mine).write_text(Path(mine).read_text().replace("15.0", "16.0"))
    again = read_resolved(tmp_path / "config.yaml").config  # reports and exports still read it
    with pytest.raises(ResumeError, match="the file has changed since the run began"):
        Python(again.algorithm)


@pytest.mark.parametrize(
    ("path", "message"), [("", "expected file.py:function"), ("no.py:dpo", "no file no.py")]
)
def test_a_path_that_is_none_is_refused_with_the_settings(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(["scenes/quick"], [f"algorithm={{type: python, path: '{path}'}}"], {})


def test_modules_beside_the_file_are_imported_and_hashed(tmp_path: Path) -> None:
    for folder, number in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").write_text(f"NUMBER = {number}\n")
        (tmp_path / folder / "mine.py").write_text(
            "import helpers\n\n\ndef loss():\n    return helpers.NUMBER\n"
        )
    files = [tmp_path / folder / "mine.py" for folder in "ab"]
    assert [load_function(file, "loss", "x")() for file in files] == [1, 2]
    assert [path.name for path in files_of(files[0])] == ["mine.py", "helpers.py"]
    before = digest_of(files[0])
    (tmp_path / "a" / "helpers.py").write_text("NUMBER = 3\n")
    assert digest_of(files[0]) != before
    with pytest.raises(MissingError, match="has no function 'los'; it defines loss"):
        load_function(files[0], "los", "x")


def test_settings_without_a_file_stand_for_the_method() -> None:
    assert PythonConfig().title == PythonConfig.title == "own loss"
