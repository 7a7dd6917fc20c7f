"""What a pass records for analyses besides counts: tokens, texts, logits, the step; and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from recording import record, text
from report_pages import assert_self_contained

from mixtura.checkpoints.view import open_model
from mixtura.errors import UserError
from mixtura.methods.analyses import Evidence, Grid, Lines, Report, Table
from mixtura.running.observing import observe
from mixtura.running.observing.analyzing import analyze, rows_of, steps_of
from mixtura.running.observing.checkpoint import step_of
from mixtura.running.observing.findings import findings_page
from mixtura.types.trace import Trace

TEXT = text([9, 14, 5, 11], [0, 1, 1, 0], seed=3)


@pytest.mark.parametrize("batch_tokens", [14, 2048])
def test_tokens_texts_and_logits_are_those_of_the_text(batch_tokens: int, tmp_path: Path) -> None:
    model: Any = tiny_model("qwen3_moe")
    kept = observe(model, TEXT, keep_choices=True, keep_logits=10, batch_tokens=batch_tokens)
    kept.save(tmp_path / "kept.trace")
    trace = Trace.load(tmp_path / "kept.trace")
    assert trace.sequence_lengths == (9, 14, 5, 11)
    assert trace.sequence_domains == (0, 1, 1, 0)
    assert torch.equal(trace.vocabulary_entries(), TEXT.input_ids[TEXT.attention_mask.bool()].int())
    assert trace.logits_every == 4
    assert trace.sequence_of_logits().tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    seen = record(model, TEXT)
    for layer in open_model(model).layers:
        hidden = torch.stack([one.hidden for one in seen[layer.name]])[::4]
        torch.testing.assert_close(trace.logits(layer.index), hidden @ layer.router_weight().T)


def test_what_was_not_recorded_is_said() -> None:
    trace = observe(tiny_model("qwen3_moe"), TEXT)
    for read in (trace.vocabulary_entries, lambda: trace.logits(0), lambda: trace.sequences(0)):
        with pytest.raises(UserError, match="observe again with keep_"):
            read()
    assert trace.of("domain1").sequence_domains == ()


def test_the_step_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-300"
    folder.mkdir()
    assert step_of(folder) == 300
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 420}))
    assert step_of(folder) == 420
    assert step_of(tmp_path) is None


def test_tables_of_runs_are_read_from_files(tmp_path: Path) -> None:
    rows = [{"name": "a", "ms": {"median": 2.5}}, {"name": "b", "ms": {"median": 3}}]
    flat = ({"name": "a", "ms.median": 2.5}, {"name": "b", "ms.median": 3})
    whole, lines, table = tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "a.csv"
    whole.write_text(json.dumps({"hardware": {"cores": 2}, "results": rows}))
    lines.write_text("\n".join(map(json.dumps, rows)))
    table.write_text("name,ms.median\na,2.5\nb,3\n")
    assert rows_of(whole) == tuple({"hardware.cores": 2, **row} for row in flat)
    assert rows_of(lines) == rows_of(table) == flat
    whole.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        rows_of(whole)
    assert rows_of(None) == steps_of(()) == ()


def test_settings_and_evidence_reach_an_analysis() -> None:
    trace = observe(tiny_model("qwen3_moe"), TEXT, keep_choices=True)
    one = analyze(trace, "late_drops", factor=0.5)
    assert one == analyze(Evidence.of(trace), "late_drops", factor=0.5)
    assert (one.scalars["dropped"] or 0) > (analyze(trace, "late_drops").scalars["dropped"] or 0)


def test_everything_of_a_report_is_on_its_page() -> None:
    report = Report(
        {"what_was_found": 0.5, "nothing": None},
        ({"layer": 0, "part": 0.25}, {"layer": 1, "part": None}),
        ("A <sentence>.",),
        (Table(title="A table", columns=("word", "number"), rows=(("one & two", 3), (None, 0.125))),),
        (
            Lines(title="Some curves", x_label="x", y_label="y", series={"curve": ((1.0, 2.0), (2.0, 3.0))}),
            Grid(title="A map", values=((1.0, None),), row_labels=("0",), column_labels=("0", "1")),
        ),
    )
    html = findings_page("Title", {"late_drops": report})
    assert_self_contained(html)
    for part in (
        "A &lt;sentence&gt;.",
        "what was found",
        "0.25",
        "A table",
        "one &amp; two",
        "Some curves",
        "A map",
    ):
        assert part in html
