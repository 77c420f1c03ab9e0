"""Tables of papers: which columns they have, what is measured for them, and the numbers that were published.
Imports without torch."""

from dataclasses import dataclass, field
from typing import Literal

from diffexpo.errors import MissingError


@dataclass(frozen=True)
class Column:
    """A column: of which suite, by which type of judge, and what of it.

    `what`: the total or a category's mean (`mean`), how often a model beats the first one (`win_rate`), or
    the Vendi score of a prompt's images (`vendi`).
    """

    title: str
    suite: str
    judge: str = ""
    category: str = ""
    what: Literal["mean", "win_rate", "vendi"] = "mean"


@dataclass(frozen=True)
class PaperTable:
    """A published table. `published` has a row for each model, a text as printed for each column; `scales`
    says what stands between those numbers and ours."""

    title: str
    source: str
    columns: tuple[Column, ...]
    published: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scales: tuple[str, ...] = ()


def _pickscore(judge: str = "pickscore") -> tuple[Column, Column]:
    return Column("Training set", "pickapic_train", judge), Column("Test set", "pickapic", judge)


HPS, PICKSCORE, AESTHETIC = "hpsv2.1", "pickscore", "aesthetic"
PICKSCORE_SCALE = "PickScore is cosine times the logit scale, as with our judge of this type."
SETS = (("training", "pickapic_train"), ("test", "pickapic"))

TABLES = {
    "expo": PaperTable(
        title="EXPO, Table 1: HPS benchmark and Pick-a-Pic v2 test",
        source="the paper's Table 1 (SD 1.5, DDPM with 50 steps, guidance 7.5)",
        columns=(
            Column("Animation", "hpsv2", HPS, "anime"),
            Column("Concept-art", "hpsv2", HPS, "concept-art"),
            Column("Paintings", "hpsv2", HPS, "paintings"),
            Column("Photos", "hpsv2", HPS, "photo"),
            Column("HPS avg", "hpsv2", HPS),
            Column("PickScore", "pickapic", PICKSCORE),
        ),
        published={
            "SD1.5": ("24.84", "23.93", "23.82", "25.02", "24.40", "0.1473"),
            "SFT": ("25.73", "24.82", "24.68", "25.21", "25.11", "0.1475"),
            "DiffusionDPO-P": ("23.89", "22.03", "22.18", "24.82", "23.23", "0.1482"),
            "DiffusionDPO-H": ("26.88", "25.98", "25.76", "25.67", "26.07", "0.1477"),
            "DiffusionKTO": ("29.91", "29.44", "29.29", "28.36", "29.25", "0.1679"),
            "SPO": ("28.73", "28.18", "28.23", "26.03", "27.79", "0.1711"),
            "EXPO-I-P": ("29.13", "28.17", "28.21", "27.02", "28.13", "0.1697"),
            "EXPO-I-H": ("30.65", "30.47", "30.44", "28.80", "30.09", "0.1682"),
            "EXPO-II-P": ("29.53", "28.60", "28.36", "26.77", "28.31", "0.1701"),
            "EXPO-II-H": ("30.47", "30.51", "30.31", "28.54", "29.96", "0.1695"),
            "EXPO-II-MP": ("30.73", "30.34", "30.23", "28.28", "29.90", "0.1726"),
            "EXPO-II-MH": ("30.86", "30.76", "30.94", "28.71", "30.32", "0.1714"),
        },
        scales=(
            "HPS v2.1 is 100 x cosine, the scale of our judge hpsv2.1.",
            "The paper's PickScore, 0.147 to 0.173, is on a scale that it does not name.",
            "Ours is cosine times the logit scale (20 to 23); divided by 100 or 26 it is not it either.",
            "So of the PickScore column only the order of rows can be compared.",
        ),
    ),
    "improvement-1": PaperTable(
        title="Improvement model, Table 1: rewards and diversity",
        source="the paper's Table 1",
        columns=tuple(
            Column(f"{title}, {which}", suite, judge, what="vendi" if title == "Vendi" else "mean")
            for which, suite in SETS
            for title, judge in (
                ("PickScore", PICKSCORE),
                ("HPSv2", "hpsv2"),
                ("Aesthetic", AESTHETIC),
                ("Vendi", ""),
            )
        ),
        scales=(
            PICKSCORE_SCALE,
            "The paper's Vendi is over 64 images a prompt; the features are not stated there.",
        ),
    ),
    "improvement-2": PaperTable(
        title="Improvement model, Table 2: online samples (PickScore)",
        source="the paper's Table 2",
        columns=_pickscore(),
        published={
            "2560 online samples": ("21.10", "21.27"),
            "12800 online samples": ("21.13", "21.36"),
            "38400 online samples": ("21.20", "21.46"),
        },
        scales=(PICKSCORE_SCALE,),
    ),
    "improvement-3": PaperTable(
        title="Improvement model, Table 3: the improvement model itself (PickScore)",
        source="the paper's Table 3",
        columns=_pickscore(),
        published={
            "SPIN": ("21.15", "21.41"),
            "Improvement model": ("21.30", "21.38"),
            "Iterative": ("21.20", "21.46"),
        },
        scales=(PICKSCORE_SCALE,),
    ),
    "improvement-4": PaperTable(
        title="Improvement model, Table 4: win rates against the first model",
        source="the paper's Table 4",
        columns=tuple(
            Column(f"{title}, {which}", suite, judge, what="win_rate")
            for which, suite in SETS
            for title, judge in (("PickScore", PICKSCORE), ("HPSv2", "hpsv2"), ("Aesthetic", AESTHETIC))
        ),
    ),
}
"""The tables by name."""


def find_table(name: str) -> PaperTable:
    """A table by name; a MissingError lists those that there are."""
    if name not in TABLES:
        raise MissingError(f"there is no table {name!r}; expected one of {', '.join(TABLES)}")
    return TABLES[name]
