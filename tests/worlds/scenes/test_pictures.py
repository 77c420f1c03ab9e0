import numpy as np
from PIL import ImageColor

from diffexpo.evaluation.records import SuiteResult
from diffexpo.types import Prompt
from worlds.scenes.pictures import FRAME, GAP, RIGHT, WRONG, ZOOM, draw_versions


def suite(version: str, scores: list[float]) -> SuiteResult:
    prompts = tuple(Prompt(f"p{number}", f"a key {number}", "single", {}) for number in range(len(scores)))
    rows = np.arange(len(scores))
    images = np.full((len(scores), 8, 8, 3), 255, np.uint8)
    return SuiteResult(
        version,
        prompts,
        rows,
        np.zeros_like(rows),
        images,
        {"correct": np.array(scores)},
        {"correct": "heldout"},
    )


def test_every_image_stands_in_the_frame_of_its_verdict():
    before, after = suite("base", [0.0, 1.0, 0.0]), suite("iteration-2", [1.0, 0.0, 0.0])
    page = draw_versions([before, after], num=3, columns=2, judge="correct")
    side = 8 * ZOOM + 2 * FRAME
    step = (2 * (side + 2) + GAP, side + 22 + GAP)
    for number in range(3):
        left, top = GAP + number % 2 * step[0], GAP + number // 2 * step[1]
        for place, versions in enumerate((before, after)):
            colour = RIGHT if versions.scores["correct"][number] else WRONG
            corner = (left + place * (side + 2), top)
            assert page.getpixel(corner) == ImageColor.getrgb(colour)
            assert page.getpixel((corner[0] + side // 2, corner[1] + side // 2)) == (255, 255, 255)
