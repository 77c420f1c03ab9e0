"""What share of damaged pictures an import finds, by decoding them and by their structure alone.

    .venv/bin/python benchmarks/damage_found.py

Damages JPEG and PNG files, 1,000 of each kind, the way disks, downloads and programs do, and gives each to
both checks of `diffexpo data import --check`. No undamaged file may be refused. The result is written to
benchmarks/results/damage_found.json.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from diffexpo.bounded.images import verify_image, verify_structure
from diffexpo.errors import ImportFormatError

CHECKS: dict[str, Callable[[bytes], None]] = {"decode": verify_image, "structure": verify_structure}
FORMATS = {
    "baseline JPEG": {"format": "JPEG", "quality": 90},
    "progressive JPEG": {"format": "JPEG", "quality": 90, "progressive": True},
    "PNG": {"format": "PNG"},
}


def picture(draw: random.Random, **options: object) -> bytes:
    """256 x 256 pixels, smooth, so that its size is that of a picture and not of noise."""
    coarse = Image.frombytes("RGB", (16, 16), draw.randbytes(768))
    out = io.BytesIO()
    coarse.resize((256, 256), Image.Resampling.BICUBIC).save(out, **options)
    return out.getvalue()


def first_pixels(data: bytes) -> int:
    """Where the header ends."""
    mark = data.find(b"\xff\xda")
    return mark + 14 if data[:2] == b"\xff\xd8" else data.index(b"IDAT") + 4


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, len(data) - 1)]


def byte_in_header(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(2, first_pixels(data))
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def byte_in_pixels(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(first_pixels(data), len(data) - 12)
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def overwritten(data: bytes, draw: random.Random, size: int = 64) -> bytes:
    place = draw.randrange(first_pixels(data), len(data) - size - 12)
    return data[:place] + draw.randbytes(size) + data[place + size :]


def sector_overwritten(data: bytes, draw: random.Random) -> bytes:
    return overwritten(data, draw, 512)


def sector_of_zeros(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(first_pixels(data), len(data) - 512 - 12)
    return data[:place] + bytes(512) + data[place + 512 :]


def piece_missing(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(first_pixels(data), len(data) - 512 - 12)
    return data[:place] + data[place + 512 :]


def end_of_another(data: bytes, draw: random.Random) -> bytes:
    """The beginning of one file and the end of another, as a broken copy joins them."""
    place = draw.randrange(first_pixels(data), len(data) - 12)
    other = overwritten(data, draw, len(data) - first_pixels(data) - 14)
    return data[:place] + other[place:]


DAMAGE = {
    "cut": cut,
    "a byte of the header changed": byte_in_header,
    "a byte of the pixels changed": byte_in_pixels,
    "64 bytes of the pixels overwritten": overwritten,
    "512 bytes of the pixels overwritten": sector_overwritten,
    "512 bytes of the pixels zeroed": sector_of_zeros,
    "512 bytes of the pixels missing": piece_missing,
    "random bytes from a place in the pixels on": end_of_another,
}


def is_refused(check: Callable[[bytes], None], data: bytes) -> bool:
    try:
        check(data)
    except ImportFormatError:
        return True
    return False


def measure(count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Format -> damage -> check -> share found."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, options in FORMATS.items():
        draw = random.Random(f"{seed} {name}")
        pictures = [picture(draw, **options) for _ in range(count)]
        wrong = sum(is_refused(check, data) for check in CHECKS.values() for data in pictures)
        if wrong:
            sys.exit(f"{name}: {wrong} undamaged pictures were refused")
        found[name] = {}
        for kind, damage in DAMAGE.items():
            damaged = [damage(data, draw) for data in pictures]
            found[name][kind] = {
                check: sum(is_refused(verify, data) for data in damaged) / count
                for check, verify in CHECKS.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "damage_found.json")
    options = parser.parse_args()
    found = measure(options.count, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"count": options.count, "seed": options.seed, "found": found}, indent=1) + "\n"
    )
    for name, kinds in found.items():
        for kind, shares in kinds.items():
            print(
                f"{name}, {kind}: "
                + ", ".join(f"{check} {100 * share:.1f}%" for check, share in shares.items())
            )


if __name__ == "__main__":
    main()
