"""From runs to a table: intervals, verdicts and the picture, worked by hand."""

from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from scipy import stats

from mixtura.train.arena.page import as_csv, markdown
from mixtura.train.arena.plot import Point, scatter
from mixtura.train.arena.standings import standings

FACTS: dict[str, Any] = {"kind": "routers", "num_seeds": 3, "tokens": 1000, "parameters": 1.5}
FACTS |= {
    "hardware": "none",
    "versions": "none",
    "layers": 2,
    "experts": 8,
    "width": 4,
    "top_k": 2,
    "dates": "a day",
}


def run(name: str, seed: int, bits: float, **more: Any) -> dict[str, Any]:
    """A run's result as it is kept."""
    return {"name": name, "seed": seed, "bits_per_byte": bits, "time_ratio": 1.0, "dead_experts": 2.0, **more}


RUNS = [
    *(run("top_k", seed, bits) for seed, bits in enumerate((2.0, 2.1, 2.2))),
    *(run("good", seed, bits) for seed, bits in enumerate((1.5, 1.61, 1.69))),
    *(run("same", seed, bits, x=1) for seed, bits in enumerate((2.0, 2.09, 2.2))),
    *(run("seer", seed, bits, leaks=True) for seed, bits in enumerate((1.0, 1.1, 1.2))),
    run("broken", 0, 0.0) | {"error": "Broken needs a thing"},
]


def test_means_intervals_and_verdicts() -> None:
    table = standings(RUNS, ["top_k"])
    assert [one.name for one in table] == ["seer", "good", "same", "top_k", "broken"]
    seer, good, same, top_k, broken = table
    assert good.values["bits_per_byte"] == pytest.approx(1.6)
    # Deviations -0.1, 0.01, 0.09: their spread over the root of 3, times Student's 4.303.
    spread = math.sqrt((0.1**2 + 0.01**2 + 0.09**2) / 2)
    assert good.half_width == pytest.approx(4.303 * spread / math.sqrt(3), rel=1e-4)
    assert good.difference == pytest.approx(-0.5)
    assert (good.verdict, same.verdict, top_k.verdict) == ("better", "not separated", "reference")
    assert (seer.verdict, seer.p_value) == ("not comparable", None)
    assert (seer.leaks, top_k.baseline) == (True, True)
    assert (broken.verdict, broken.error) == ("not trained", "Broken needs a thing")


def test_one_seed_separates_nothing() -> None:
    table = standings([run("top_k", 0, 2.0), run("other", 0, 1.0)], [])
    assert table[0].half_width is None
    assert table[0].verdict == "not separated"


def test_p_values_are_corrected_for_their_number() -> None:
    table = {one.name: one for one in standings(RUNS, ["top_k"])}
    # Differences -0.5, -0.49, -0.51 and 0, -0.01, 0: four degrees of freedom.
    squares = 0.01**2 + 0.01**2 + 2 * (0.01 / 3) ** 2 + (0.02 / 3) ** 2
    error = math.sqrt(squares / 4) / math.sqrt(3)
    plain = [2 * stats.t.sf(mean / error, 4) for mean in (0.5, 0.01 / 3)]
    assert table["good"].p_value == pytest.approx(2 * plain[0])
    assert table["same"].p_value == pytest.approx(plain[1])


def test_the_page_and_the_table_hold_everything() -> None:
    table = standings(RUNS, ["top_k"])
    page = markdown("routers", table, FACTS, "routers.svg")
    assert "`seer` \\*" in page
    assert "*top_k*" in page
    assert "Broken needs a thing" in page
    assert "1 better, 0 worse, 1 not separated, 1 not comparable" in page
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["name"] for row in rows] == ["seer", "good", "same", "top_k", "broken"]
    assert float(rows[1]["difference"]) == pytest.approx(-0.5)


def test_labels_of_the_picture_do_not_overlap() -> None:
    points = [Point(f"method_{n}", 1 + n % 5 * 0.01, 2 + n // 5 * 0.01, 0.001, "better") for n in range(60)]
    svg = scatter(points, title="a < b", x_label="x", y_label="y")
    root = ET.fromstring(svg)
    named = [e for e in root.iter() if e.tag.endswith("text") and (e.text or "").startswith("method_")]
    assert len(named) == 60
    boxes = []
    for e in named:
        width = 6.5 * len(e.text or "")
        x, y = float(e.attrib["x"]), float(e.attrib["y"])
        left = x if e.attrib["text-anchor"] == "start" else x - width
        boxes.append((left, y - 9, left + width, y))
    for place, a in enumerate(boxes):
        for b in boxes[place + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_one_point_and_a_dear_one_can_be_drawn() -> None:
    one = Point("a", 1.0, 2.0, 0.0, "reference")
    ET.fromstring(scatter([one], title="t", x_label="x", y_label="y"))
    ET.fromstring(
        scatter([one, Point("b", 40.0, 3.0, 0.1, "worse", True, True)], title="t", x_label="x", y_label="y")
    )
