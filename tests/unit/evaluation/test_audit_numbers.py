"""What an audit has left in a run's folder stands in the run's report."""

from __future__ import annotations

import json
from pathlib import Path

from diffexpo.evaluation.report import write_report
from tests.unit.evaluation.synthetic_run import make_run

SHARE = [0.3, 0.2, 0.4]
NUMBERS = {
    "models": ["run, base", "run"],
    "attributes": {
        "skin_tone": {
            "values": ["light", "dark"],
            "change": [-0.15, -0.2, -0.1],
            "models": {
                "run, base": {
                    "from_uniform": SHARE,
                    "from_reference": [0.01, 0.0, 0.05],
                    "groups": {"a": {}, "b": {}},
                },
                "run": {
                    "from_uniform": [0.15, 0.1, 0.2],
                    "from_reference": None,
                    "groups": {"a": {}, "b": {}},
                },
            },
        }
    },
    "safety": {"neutral": {"nsfw": {"run": {"unsafe": 2, "images": 8, "share": [0.25, 0.07, 0.59]}}}},
}


def test_a_report_says_who_is_drawn(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    write_report(run_dir)
    before = (run_dir / "report.html").read_text()
    assert "Who is drawn" not in before
    (run_dir / "audit").mkdir()
    (run_dir / "audit" / "audit.json").write_text(json.dumps(NUMBERS))
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    section = page.partition('<h2 id="drawn">')[2].partition("<h2 ")[0]
    for part in (
        "skin tone",
        "30.0%",
        "[20.0%, 40.0%]",
        "1.0%",
        "-15.0",
        "[-20.0, -10.0]",
        'href="audit/audit.html"',
    ):
        assert part in section, part
    assert section.count("-15.0") == 1, "the change stands beside the last model"
    assert "Unsafe by nsfw on neutral prompts, run: 2 of 8 images, 25.0% [7.0%, 59.0%]." in section
    assert '<a href="#drawn">Who is drawn</a>' in page
    (run_dir / "audit" / "audit.json").write_text("{")
    write_report(run_dir)
    assert (run_dir / "report.html").read_text() == before, "numbers that cannot be read are left out"
