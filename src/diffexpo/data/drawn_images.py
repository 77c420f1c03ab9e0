"""Images that others have drawn, with their prompts: the layouts in which models are published and compared.

    metadata.jsonl             one object a line: file_name, and prompt, text or caption
    prompts.txt                one prompt a line; the images are 00000.png, 00001.png ...
    a.png + a.txt              the prompt beside its image
    00000/metadata.jsonl       GenEval's: a prompt, and its images in 00000/samples
    CATEGORY/00000.jpg         HPSv2's: the prompt of this number in the category's published list

Nothing outside of the folder is read. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diffexpo.bounded.texts import is_junk
from diffexpo.data.prompts import json_records, prompt_lines
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.types import Prompt

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LAYOUTS = (
    "metadata.jsonl with file_name and prompt, prompts.txt beside 00000.png, a text file beside each image, "
    "GenEval's or HPSv2's folders"
)
Found = Iterator[tuple[str, Path]]
"""(prompt, image) couples."""


def drawn_images(folder: Path, prompts: Sequence[Prompt]) -> dict[str, list[Path]]:
    """The images of each prompt's text, in the order of the folder.

    Args:
        folder: In one of the layouts above.
        prompts: The list that HPSv2's numbers count, category by category.
    Raises:
        MissingError: the folder holds no image, or no prompts, or an image that is named is not there.
        ImportFormatError: a line that cannot be read, or a file outside of the folder.
    """
    layouts: list[Callable[[Path, Sequence[Prompt]], Found]] = [_metadata, _listed, _geneval, _hpsv2, _beside]
    for layout in layouts:
        found: dict[str, list[Path]] = {}
        for text, path in layout(folder, prompts):
            found.setdefault(text, []).append(path)
        if found:
            return found
    count = len(_files(folder, "**/*"))
    raise MissingError(f"{folder} holds {count} images and no prompts for them; expected {LAYOUTS}")


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, by name; MissingError without one."""
    found = _files(folder, "**/*")
    if not found:
        raise MissingError(f"{folder} holds no image; expected files that end in {', '.join(ENDINGS)}")
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in found if not any(map(is_junk, path.relative_to(folder).parts)))


def _metadata(folder: Path, prompts: Sequence[Prompt]) -> Found:
    path = folder / "metadata.jsonl"
    for where, record in json_records(path, "with file_name and prompt") if path.is_file() else ():
        name = record.get("file_name")
        text = next((record[key] for key in ("prompt", "text", "caption") if record.get(key)), None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ImportFormatError(
                f"{where} is {str(record)[:60]!r}; expected an object with file_name and prompt"
            )
        image = folder / name
        if not image.resolve().is_relative_to(folder.resolve()):
            raise ImportFormatError(f"{where}: {name!r} lies outside of {folder}; expected a file in it")
        if not image.is_file():
            raise MissingError(f"{where}: {image} does not exist; it is the image of {text!r:.60}")
        yield text.strip(), image


def _listed(folder: Path, prompts: Sequence[Prompt]) -> Found:
    path = folder / "prompts.txt"
    for number, (_, text) in enumerate(prompt_lines(path) if path.is_file() else ()):
        images = [folder / f"{number:05d}{ending}" for ending in ENDINGS]
        yield from ((text, image) for image in images if image.is_file())


def _geneval(folder: Path, prompts: Sequence[Prompt]) -> Found:
    for path in sorted(folder.glob("*/metadata.jsonl")):
        for where, record in json_records(path, "with prompt"):
            if not isinstance(record.get("prompt"), str):
                raise ImportFormatError(f"{where} has no prompt; expected GenEval's metadata")
            for image in _files(path.parent, "samples/*"):
                yield str(record["prompt"]).strip(), image


def _hpsv2(folder: Path, prompts: Sequence[Prompt]) -> Found:
    for category in dict.fromkeys(prompt.category for prompt in prompts if prompt.category):
        own = [prompt for prompt in prompts if prompt.category == category]
        texts = {prompt.attributes.get("number", str(place)): prompt.text for place, prompt in enumerate(own)}
        for image in _files(folder / category, "*"):
            number = str(int(image.stem)) if image.stem.isdecimal() else ""
            if number in texts:
                yield texts[number], image


def _beside(folder: Path, prompts: Sequence[Prompt]) -> Found:
    for image in _files(folder, "**/*"):
        text = image.with_suffix(".txt")
        if text.is_file():
            yield text.read_text(encoding="utf-8", errors="replace").strip(), image
