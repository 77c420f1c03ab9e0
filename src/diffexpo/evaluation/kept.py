"""A whole evaluation on disk, read again without its models and judges.

<out>/suite.json     the suite as it was asked for, and its prompts
<out>/models/<name>  a gallery each
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffexpo.config.suites import Suite
from diffexpo.errors import ConfigError, DataError, MissingError
from diffexpo.evaluation.benchmark import Json, Judge, Judged, Outcome
from diffexpo.evaluation.gallery import Gallery, Rows, read_json
from diffexpo.files import write_json
from diffexpo.types import Prompt

FILE = "suite.json"


def keep_suite(out: Path, suite: Suite, rows: Rows, order: Mapping[str, int]) -> None:
    """Write what a folder is for; see `check_suite` for what is refused."""
    drawing = check_suite(out, suite, rows, order)
    write_json(out / FILE, {"drawing": drawing, "suite": suite.model_dump(mode="json")})


def check_suite(out: Path, suite: Suite, rows: Rows, order: Mapping[str, int]) -> Json:
    """What the images of a folder depend on; a ConfigError for one that holds other prompts or drew
    otherwise."""
    path = out / FILE
    prompts = [
        {**vars(prompt), "attributes": dict(prompt.attributes), "place": order[prompt.id]}
        for prompt in rows.prompts
    ]
    drawing: Json = {"name": suite.name, **suite.drawing, "the prompts themselves": prompts}
    before = read_json(path)
    if path.exists() and before is None:
        raise DataError(f"{path} is damaged; delete it, and the same command writes it anew")
    for name in drawing if before else ():
        was, now = (before or {}).get("drawing", {}).get(name), drawing[name]
        if was != now:
            told = (
                f"{name} was {was}, now {now}"
                if name != "the prompts themselves"
                else "its prompts have changed"
            )
            raise ConfigError(f"{out} holds another evaluation: {told}; choose another folder with --out")
    return drawing


def read_outcome(out: Path) -> Outcome:
    """All models of an evaluation's folder, and all judges that have seen every one of them; of a judge's
    versions the one that has seen the most, then the latest.

    Raises:
        MissingError: no evaluation lies there.
    """
    found = read_json(out / FILE)
    if found is None:
        raise MissingError(f"{out} holds no evaluation ({FILE}); expected a folder of `diffexpo evaluate`")
    suite, listed = Suite.model_validate(found["suite"]), found["drawing"]["the prompts themselves"]
    order = {one["id"]: int(one["place"]) for one in listed}
    prompts = tuple(Prompt(one["id"], one["text"], one["category"], one["attributes"]) for one in listed)
    rows = Rows(prompts, suite.images_per_prompt, suite.batch_size)
    galleries = [Gallery(path.parent, rows) for path in sorted(out.glob("models/*/model.json"))]
    seen: dict[str, list[Judge]] = {}
    for gallery in galleries:
        for facts in gallery.judges():
            named = {name: value for name, value in facts.items() if name != "trained"}
            seen.setdefault(str(facts["key"]), []).append(Judge(**named))
    best: dict[str, tuple[int, Judge]] = {}
    for judges in seen.values():
        if len(judges) >= best.get(judges[0].name, (0, judges[0]))[0]:
            best[judges[0].name] = (len(judges), judges[0])
    chosen = tuple(judge for _, judge in best.values())
    models = tuple(
        Judged(
            str(gallery.facts()["label"]),
            str(gallery.facts()["what"]),
            gallery,
            {judge.name: gallery.scores(judge.key) for judge in chosen},
            tuple(str(facts["name"]) for facts in gallery.judges() if facts.get("trained")),
        )
        for gallery in galleries
    )
    return Outcome(suite, rows, models, chosen, order)
