"""What an evaluation measures of sets of images: their distance from real ones, and how varied they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from diffexpo.assembly.evaluating import pixel_features
from diffexpo.bounded.images import read_image
from diffexpo.data.drawn_images import image_files
from diffexpo.errors import DataError
from diffexpo.evaluation.benchmark import Json, Judged, Outcome
from diffexpo.evaluation.frechet import cmmd, frechet_distance
from diffexpo.evaluation.gallery import read_json
from diffexpo.evaluation.metrics import bootstrap_mean, vendi_score
from diffexpo.evaluation.suites import Embedder
from diffexpo.evaluation.totals import Estimate
from diffexpo.files import write_json

NOTHING = 1e-6
"""Features below it in all places are those of an image of a single colour, and rounding."""
PIXELS = Embedder(pixel_features, "32x32 pixels")


def set_distances(outcome: Outcome, folder: Path, embedder: Embedder) -> Json:
    """Fréchet distance and CMMD of each model's images from the real ones of a folder.

    Images without features (of pixels one of a single colour has none, such as the black ones of a safety
    checker) are left out and counted.

    Raises:
        DataError: fewer than two images of one side.
    """
    real, no_real = _told_apart((read_image(path) for path in image_files(folder)), embedder)
    models: Json = {}
    for model in outcome.models:
        drawn = (model.gallery.read(row) for row in range(len(outcome.rows)))
        own, none = _told_apart((image for image in drawn if image is not None), embedder)
        if min(len(own), len(real)) < 2:
            raise DataError(
                f"--real {folder}: {len(real)} real images and {len(own)} of {model.label} have features; "
                "expected at least 2 of each"
            )
        models[model.label] = {
            "num": len(own),
            "left_out": none,
            "frechet": frechet_distance(own, real),
            "cmmd": cmmd(own, real),
        }
    return {
        "folder": str(folder),
        "num": len(real),
        "left_out": no_real,
        "features": embedder.name,
        "models": models,
    }


def diversities(outcome: Outcome, embedder: Embedder, version: str) -> Json | None:
    """Vendi score of each model, of the embedder's features and of pixels; None for one image a prompt.

    Those of a judge's features are kept in the model's folder (`vendi-VERSION.json`) with the images that
    they are of, so that a further call takes only what is new.
    """
    if outcome.rows.images_per_prompt < 2:
        return None
    models: Json = {}
    for model in outcome.models:
        found: Json = {PIXELS.name: vendi_of(outcome, model)}
        if embedder.name != PIXELS.name:
            kept = model.gallery.folder / f"vendi-{hashlib.sha256(version.encode()).hexdigest()[:12]}.json"
            found[embedder.name] = vendi_of(outcome, model, embedder, kept)
        models[model.label] = found
    return {"images": outcome.rows.images_per_prompt, "models": models}


def vendi_of(
    outcome: Outcome, model: Judged, embedder: Embedder = PIXELS, kept: Path | None = None
) -> Estimate | None:
    """Mean over prompts of the Vendi score of a prompt's images; None for one image a prompt.

    Prompts without all of their images are left out, and so are those with an image that has no features (one
    of a single colour has none in pixels).

    Args:
        kept: File of the scores so far, by prompt, with the images that they are of; it is read and written.
    """
    count = outcome.rows.images_per_prompt
    if count < 2:
        return None
    before = {} if kept is None else read_json(kept) or {}
    scores: dict[str, tuple[str, float | None]] = {}
    for place, prompt in enumerate(outcome.rows.prompts):
        rows = range(place * count, (place + 1) * count)
        digests = [model.gallery.digest(row) for row in rows]
        if None in digests:
            continue
        seen = hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()
        known = before.get(prompt.id)
        if known and known[0] == seen:
            scores[prompt.id] = known[0], known[1]
            continue
        images = [image for row in rows if (image := model.gallery.read(row)) is not None]
        features = _features(images, embedder)
        scores[prompt.id] = seen, vendi_score(features) if _has_features(features).all() else None
    if kept is not None and scores != {name: tuple(value) for name, value in before.items()}:
        write_json(kept, scores)
    values = [value for _, value in scores.values() if value is not None]
    return bootstrap_mean(values) if values else None


def _told_apart(images: Iterable[np.ndarray], embedder: Embedder) -> tuple[np.ndarray, int]:
    """Features of the images that have any, and how many have none."""
    features = _features(images, embedder)
    kept = _has_features(features)
    return features[kept], int((~kept).sum())


def _has_features(features: np.ndarray) -> np.ndarray:
    there: np.ndarray = np.abs(features).max(axis=1, initial=0.0) > NOTHING
    return there


def _features(images: Iterable[np.ndarray], embedder: Embedder) -> np.ndarray:
    """Features (N, d) of images (H,W,3) uint8, of any sizes."""
    found = []
    for image in images:
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255.0)
        found.append(embedder.features(pixels).detach().double().cpu().numpy())
    return np.concatenate(found) if found else np.zeros((0, 1))
