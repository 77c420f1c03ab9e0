"""An audit as one self-contained page, as JSON and as lines for a console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

import diffexpo
from diffexpo.config.audit import AuditConfig
from diffexpo.evaluation.audit import AttributeResult, AuditResult, UnsafeShare, group_of
from diffexpo.evaluation.audit_numbers import JSON_FILE, PAGE
from diffexpo.evaluation.bias import Drawn, Interval, Mix
from diffexpo.evaluation.grid import data_uri
from diffexpo.evaluation.records import SuiteResult
from diffexpo.evaluation.templates import HERE, template
from diffexpo.files import write_json, write_text

MAX_GROUPS, MAX_IMAGES, MAX_UNSAFE = 12, 8, 8
_BLUR = 6
"""Pixels a side that are left of an unsafe image: what it shows cannot be had back."""


def write_audit(folder: Path, audit: AuditConfig, result: AuditResult) -> None:
    """Write `audit.json` and `audit.html` into a folder."""
    numbers = audit_numbers(audit, result)
    page = template("audit.html.j2").render(
        numbers,
        version=diffexpo.__version__,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        audit=audit,
        pictures=_pictures(audit, result),
        unsafe=_unsafe_pictures(result),
    )
    write_text(folder / PAGE, page)
    write_json(folder / JSON_FILE, numbers)


def audit_numbers(audit: AuditConfig, result: AuditResult) -> dict[str, Any]:
    """Everything that was measured, as JSON values; intervals are [estimate, low, high]."""
    models = list(next(iter(result.suites.values()), {}))
    return {
        "name": audit.name,
        "seed": audit.seed,
        "models": models,
        "images": {
            kind: {model: len(suite.images) for model, suite in drawn.items()}
            for kind, drawn in result.suites.items()
        },
        "attributes": {name: _attribute(one) for name, one in result.attributes.items()},
        "readable": {model: list(share) for model, share in result.readable.items()},
        "quality": {
            judge: {model: list(mean) for model, mean in means.items()}
            for judge, means in result.quality.items()
        },
        "safety": {
            kind: {
                scorer: {model: _share(share) for model, share in shares.items()}
                for scorer, shares in found.items()
            }
            for kind, found in result.safety.items()
        },
    }


def _attribute(one: AttributeResult) -> dict[str, Any]:
    return {
        "values": list(one.values),
        "recall": None if one.recall is None else list(one.recall),
        "labelled": one.labelled,
        "unrecognised": list(one.unrecognised),
        "change": None if one.change is None else list(one.change),
        "groups": list(dict.fromkeys(row.group for mix in one.mixes.values() for row in mix.groups)),
        "models": {model: _mix(mix) for model, mix in one.mixes.items()},
    }


def _mix(mix: Mix) -> dict[str, Any]:
    return {
        "from_uniform": list(mix.from_uniform),
        "from_reference": _maybe(mix.from_reference),
        "groups": {one.group: _group(one) for one in mix.groups},
    }


def _group(one: Drawn) -> dict[str, Any]:
    return {
        "said": list(one.said),
        "unread": one.unread,
        "shares": [list(share) for share in one.shares],
        "from_uniform": list(one.from_uniform),
        "fair": one.fair,
        "from_reference": _maybe(one.from_reference),
    }


def _maybe(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _share(share: UnsafeShare) -> dict[str, Any]:
    return {"share": list(share.share), "unsafe": share.unsafe, "images": share.images}


def describe_audit(audit: AuditConfig, result: AuditResult) -> list[str]:
    """The main numbers, a line each."""
    lines = []
    for name, one in result.attributes.items():
        if one.unrecognised:
            missed = ", ".join(one.unrecognised)
            lines.append(
                f"{name}: not reported, the classifier recognises {missed} in half of its images or less"
            )
            continue
        for model, mix in one.mixes.items():
            lines.append(
                f"{name}, {model}: {_told(mix.from_uniform)} from uniform, mean of {len(mix.groups)}"
            )
        if one.change is not None:
            lines.append(f"{name}: the last model less the first {_told(one.change, signed=True)}")
    for judge, means in result.quality.items():
        told = ", ".join(
            f"{model} {mean[0]:.3f} [{mean[1]:.3f}, {mean[2]:.3f}]" for model, mean in means.items()
        )
        lines.append(f"quality, {judge}: {told}")
    for kind, found in result.safety.items():
        for scorer, shares in found.items():
            for model, share in shares.items():
                lines.append(
                    f"unsafe by {scorer} on {kind} prompts, {model}: {share.unsafe} of {share.images}, "
                    f"{_told(share.share)}"
                )
    return lines


def _told(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    first, low, high = (f"{100 * value:{sign}.1f}" for value in interval)
    return f"{first}% [{low}, {high}]"


def _pictures(audit: AuditConfig, result: AuditResult) -> list[dict[str, Any]]:
    """The first images of the first groups, of every model: by keyed noise, not chosen."""
    drawn = result.suites.get("open", {})
    groups: dict[str, dict[str, list[str]]] = {}
    for model, suite in drawn.items():
        for row, index in enumerate(suite.prompt_index):
            group = group_of(suite.prompts[index], audit.group_by)
            if group not in groups and len(groups) == MAX_GROUPS:
                continue
            shown = groups.setdefault(group, {}).setdefault(model, [])
            if len(shown) < MAX_IMAGES:
                shown.append(data_uri(suite.images[row]))
    return [{"group": group, "models": models} for group, models in groups.items()]


def _unsafe_pictures(result: AuditResult) -> list[dict[str, Any]]:
    """Images that were called unsafe, blurred beyond recognition."""
    return [
        {
            "kind": kind,
            "scorer": scorer,
            "model": model,
            "images": [_blurred(result.suites[kind][model], row) for row in share.rows[:MAX_UNSAFE]],
        }
        for kind, found in result.safety.items()
        for scorer, shares in found.items()
        for model, share in shares.items()
        if share.rows
    ]


def _blurred(suite: SuiteResult, row: int) -> str:
    image = Image.fromarray(suite.images[row])
    small = image.resize((_BLUR, _BLUR), Image.Resampling.BOX)
    return data_uri(np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC)))
