"""Folders of images that others have drawn, in every layout, and those that cannot be read."""

import json

import numpy as np
import pytest
from PIL import Image

from diffexpo.bounded.images import read_image
from diffexpo.data.drawn_images import drawn_images, image_files
from diffexpo.data.prompt_lists import read_prompt_list
from diffexpo.errors import DataError, ImportFormatError, MissingError
from diffexpo.types import Prompt

CAT, DOG = Prompt("c", "a cat", "photo"), Prompt("d", "a dog", "photo")


def draw(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)
    return path


def lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def metadata(root):
    lines(
        root / "metadata.jsonl",
        {"file_name": "x.png", "prompt": "a cat"},
        {"file_name": "y.png", "text": "a dog"},
    )
    return draw(root / "x.png"), draw(root / "y.png")


def listed(root):
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return draw(root / "00000.png"), draw(root / "00001.jpg")


def geneval(root):
    made = []
    for number, prompt in enumerate((CAT, DOG)):
        made.append(draw(root / f"{number:05d}" / "samples" / "0000.png"))
        lines(root / f"{number:05d}" / "metadata.jsonl", {"tag": "single_object", "prompt": prompt.text})
    return tuple(made)


def hpsv2(root):
    return draw(root / "photo" / "00000.jpg"), draw(root / "photo" / "00001.jpg")


def beside(root):
    made = draw(root / "first.png"), draw(root / "second.png")
    for path, prompt in zip(made, (CAT, DOG), strict=True):
        path.with_suffix(".txt").write_text(f"{prompt.text}\n")
    return made


@pytest.mark.parametrize("layout", [metadata, listed, geneval, hpsv2, beside])
def test_every_layout_gives_each_prompt_its_images(layout, tmp_path):
    cat, dog = layout(tmp_path)
    assert drawn_images(tmp_path, [CAT, DOG]) == {"a cat": [cat], "a dog": [dog]}


def test_numbers_are_those_of_the_published_list_where_prompts_come_twice(tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "photo.json").write_text('["a cat", "a cat", "a dog"]')
    prompts, report = read_prompt_list(tmp_path / "list", "hpdv2")
    assert report.duplicates == 1
    cat, _, dog = (draw(tmp_path / "photo" / f"{number:05d}.jpg") for number in range(3))
    assert drawn_images(tmp_path, prompts) == {"a cat": [cat], "a dog": [dog]}


def test_several_images_of_a_prompt_keep_their_order(tmp_path):
    names = ["b.png", "a.png"]
    paths = [draw(tmp_path / name) for name in names]
    lines(tmp_path / "metadata.jsonl", *({"file_name": name, "prompt": "a cat"} for name in names))
    assert drawn_images(tmp_path, [CAT]) == {"a cat": paths}


def test_images_without_prompts_are_refused_with_the_layouts(tmp_path):
    draw(tmp_path / "x.png")
    with pytest.raises(
        MissingError, match=r"holds 1 images and no prompts for them; expected metadata\.jsonl"
    ):
        drawn_images(tmp_path, [CAT])
    with pytest.raises(MissingError, match="holds no image"):
        image_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"file_name": "../x.png", "prompt": "a cat"}, ImportFormatError, "line 1: .*outside of"),
        ({"file_name": "gone.png", "prompt": "a cat"}, MissingError, "gone.png does not exist"),
        ({"prompt": "a cat"}, ImportFormatError, "with file_name and prompt"),
    ],
)
def test_lines_that_name_no_image_of_the_folder(record, error, message, tmp_path):
    draw(tmp_path / "here" / "x.png")
    lines(tmp_path / "here" / "metadata.jsonl", record)
    with pytest.raises(error, match=message):
        drawn_images(tmp_path / "here", [CAT])


def test_images_are_read_as_they_are_shown(tmp_path):
    clear = Image.fromarray(np.zeros((2, 2, 4), np.uint8))
    clear.save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="no image that can be read"):
        read_image(tmp_path / "text.png")
