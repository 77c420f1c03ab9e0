"""An audit's numbers from images whose truth is known, read by a classifier whose errors are planted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.config.audit import AttributeConfig, AuditConfig, SafetyConfig
from diffexpo.errors import DataError
from diffexpo.evaluation.audit import Labelled, Scorers, calibration_of, group_of, measure_audit
from diffexpo.evaluation.audit_numbers import drawn_rows, read_numbers, safety_lines
from diffexpo.evaluation.audit_page import describe_audit, write_audit
from diffexpo.evaluation.records import SuiteResult
from diffexpo.types import Prompt

JOBS = ("judge", "cook")
HAT = AttributeConfig(
    values={"yes": "a hat {noun}", "no": "a bald {noun}"}, reference={"judge": {"yes": 0.9, "no": 0.1}}
)
AUDIT = AuditConfig(attributes={"hat": HAT}, resamples=200)


class Reader:
    """Sees a hat where an image is red; dim red ones it takes for bald."""

    name, version, scale = "reader", "1", "logit"

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        is_red = images[:, 0].mean(dim=(1, 2)) > 0.5
        return torch.tensor(
            [float(("hat" in text) == bool(red)) for text, red in zip(prompts, is_red, strict=True)]
        )


class Bright:
    """The blue of an image, as a probability."""

    name, version, scale = "bright", "1", "probability"

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 2].mean(dim=(1, 2))


def image(red: int, blue: int = 255) -> np.ndarray:
    found = np.zeros((8, 8, 3), dtype=np.uint8)
    found[..., 0], found[..., 2] = red, blue
    return found


def suite(model: str, rows: list[tuple[int, np.ndarray]]) -> SuiteResult:
    prompts = tuple(Prompt(job, f"a {job}", "person", {"occupation": job}) for job in JOBS)
    numbers = [index for index, _ in rows]
    return SuiteResult(
        model,
        prompts,
        np.array(numbers),
        np.array([numbers[:row].count(index) for row, index in enumerate(numbers)]),
        np.stack([pixels for _, pixels in rows]),
        {},
        {},
    )


def labelled(dim: int) -> list[Labelled]:
    """40 images of each value and job; of those with a hat, `dim` in 40 are too dim to be recognised."""
    found = []
    for job in JOBS:
        for number in range(40):
            for value, red in (("yes", 100 if number < dim else 250), ("no", 0)):
                attributes = {"occupation": job, "hat": value}
                found.append((image(red), Prompt(f"{job}{number}{value}", f"a {job}", "", attributes)))
    return found


BEFORE = suite("base", [(0, image(250))] * 9 + [(0, image(0))] + [(1, image(250))] * 5 + [(1, image(0))] * 5)
AFTER = suite(
    "tuned", [(0, image(250))] * 5 + [(0, image(0))] * 5 + [(1, image(250))] * 5 + [(1, image(0))] * 5
)
MODELS = {"base": BEFORE, "tuned": AFTER}


def test_shares_distances_and_the_change() -> None:
    result = measure_audit(AUDIT, Scorers(Reader()), {"open": MODELS}, labelled(0))
    hat = result.attributes["hat"]
    assert hat.recall == (1.0, 1.0) and hat.labelled == 160 and not hat.unrecognised
    judge, cook = hat.mixes["base"].groups
    assert (judge.group, judge.said, cook.said) == ("judge", (9, 1), (5, 5))
    assert judge.shares[0][0] == pytest.approx(0.9, abs=1e-6) and judge.from_uniform[0] == pytest.approx(
        0.4, abs=1e-6
    )
    assert judge.from_reference is not None and judge.from_reference[0] == pytest.approx(0.0, abs=1e-6)
    assert cook.from_reference is None and hat.mixes["base"].from_reference is None
    assert hat.mixes["base"].from_uniform[0] == pytest.approx(0.2, abs=1e-6)
    assert hat.change is not None and hat.change[0] == pytest.approx(-0.2, abs=1e-6)


def test_a_biased_reader_is_corrected_by_what_it_misses() -> None:
    """It misses a quarter of the hats, so that 3 hats seen of 8 are 4 of 8: no bias."""
    seen = {"base": suite("base", [(0, image(250))] * 3 + [(0, image(100))] + [(0, image(0))] * 4)}
    believed = measure_audit(AUDIT, Scorers(Reader()), {"open": seen}, None).attributes["hat"]
    assert believed.recall is None and believed.mixes["base"].groups[0].shares[0][0] == pytest.approx(0.375)
    corrected = measure_audit(AUDIT, Scorers(Reader()), {"open": seen}, labelled(10)).attributes["hat"]
    assert corrected.recall == (0.75, 1.0)
    assert corrected.mixes["base"].groups[0].shares[0][0] == pytest.approx(0.5, abs=1e-4)


def test_a_reader_who_sees_no_hats_is_no_witness() -> None:
    result = measure_audit(AUDIT, Scorers(Reader()), {"open": MODELS}, labelled(20))
    hat = result.attributes["hat"]
    assert hat.unrecognised == ("yes",) and not hat.mixes and hat.change is None
    assert describe_audit(AUDIT, result) == [
        "hat: not reported, the classifier recognises yes in half of its images or less"
    ]


def test_images_that_show_nothing_of_the_prompt_are_counted_and_left_out() -> None:
    dark = suite("base", [(0, image(250))] * 4 + [(0, image(250, blue=0))] * 3)
    result = measure_audit(AUDIT, Scorers(Reader(), readable=Bright()), {"open": {"base": dark}}, labelled(0))
    (judge,) = result.attributes["hat"].mixes["base"].groups
    assert (sum(judge.said), judge.unread) == (4, 3)
    assert result.readable["base"][0] == pytest.approx(4 / 7)
    with pytest.raises(DataError, match="no image can be read"):
        black = {"base": suite("base", [(0, image(250, blue=0))])}
        measure_audit(AUDIT, Scorers(Reader(), readable=Bright()), {"open": black}, labelled(0))


def test_labels_that_are_missing_are_named() -> None:
    with pytest.raises(DataError, match="attribute hair: no labelled image says it"):
        calibration_of("hair", HAT, Reader(), labelled(0), "occupation")
    wrong = [(pixels, Prompt(p.id, p.text, "", {"hat": "maybe"})) for pixels, p in labelled(0)]
    with pytest.raises(DataError, match="attribute hat: labels maybe are no values"):
        calibration_of("hat", HAT, Reader(), wrong, "occupation")
    with pytest.raises(DataError, match="no labelled image shows no"):
        calibration_of(
            "hat", HAT, Reader(), [one for one in labelled(0) if one[1].attributes["hat"] == "yes"], "x"
        )


def test_groups_of_prompts() -> None:
    prompt = Prompt("a", "a judge", "person", {"occupation": "judge"})
    assert [group_of(prompt, "occupation"), group_of(prompt, "hat")] == ["judge", "person"]
    assert group_of(Prompt("a", "a judge"), "occupation") == "a judge"


def safety(images: list[np.ndarray]) -> tuple[AuditConfig, dict[str, dict[str, SuiteResult]]]:
    audit = AuditConfig(safety=SafetyConfig(safe_from=0.5), resamples=50)
    return audit, {"neutral": {"base": suite("base", [(0, pixels) for pixels in images])}}


def test_the_share_of_unsafe_images() -> None:
    audit, suites = safety([image(0, 255)] * 3 + [image(0, 50)])
    result = measure_audit(audit, Scorers(safety=[Bright()]), suites, None)
    share = result.safety["neutral"]["bright"]["base"]
    assert (share.unsafe, share.images, share.rows, share.share[0]) == (1, 4, (3,), 0.25)
    assert 0 < share.share[1] < 0.25 < share.share[2] < 1


def test_unsafe_images_are_not_in_the_page(tmp_path: Path) -> None:
    """What is shown has 6 x 6 pixels' worth of the image: a chessboard of single pixels is grey in it."""
    board = np.zeros((48, 48, 3), dtype=np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    audit, suites = safety([board])
    write_audit(tmp_path, audit, measure_audit(audit, Scorers(safety=[Bright()]), suites, None))
    page = (tmp_path / "audit.html").read_text()
    assert (
        "Called unsafe by bright, neutral prompts, base; blurred" in page and "No provoking prompts" in page
    )
    import base64
    import io
    import re

    from PIL import Image

    shown = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(shown) == 1
    with Image.open(io.BytesIO(base64.b64decode(shown[0]))) as blurred:
        pixels = np.asarray(blurred.convert("RGB"), dtype=float)
    assert pixels.std() < 1.0 and board.std() == 100.0


def test_page_numbers_and_lines_say_the_same(tmp_path: Path) -> None:
    audit = AUDIT.model_copy(update={"name": "<b>jobs</b>"})
    result = measure_audit(audit, Scorers(Reader(), judges=[Bright()]), {"open": MODELS}, labelled(0))
    write_audit(tmp_path, audit, result)
    page, numbers = (tmp_path / "audit.html").read_text(), read_numbers(tmp_path)
    assert "&lt;b&gt;jobs" in page and "<b>jobs" not in page
    assert numbers is not None and numbers == json.loads((tmp_path / "audit.json").read_text())
    rows = drawn_rows(numbers)
    assert [(row["model"], row["is_last"]) for row in rows] == [("base", False), ("tuned", True)]
    assert rows[0]["from_uniform"][0] == pytest.approx(0.2, abs=1e-6) and safety_lines(numbers) == []
    assert "90.0%" in page and "tuned less base, mean distance from uniform: -20.0 points" in page
    told = describe_audit(audit, result)
    assert told[0].startswith("hat, base: 20.0% [") and any(
        line.startswith("hat: the last model less the first -20.0%") for line in told
    )
    assert not math.isnan(numbers["quality"]["bright"]["base"][0])


@pytest.mark.parametrize("text", [None, "{", "[]", '{"models": []}'])
def test_numbers_that_cannot_be_read_are_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "audit.json").write_text(text)
    assert read_numbers(tmp_path) is None
