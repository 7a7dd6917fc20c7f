"""What a fit prints: names as they are, numbers without exponents, lines to copy in one piece."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mixtura.fitting.estimate import Estimate, PlanEstimate
from mixtura.fitting.printing import narrated, print_estimate, print_fitted
from mixtura.fitting.records import Quality
from mixtura.fitting.result import Fitted, Row
from mixtura.types import Plan

ODD = ("[/code]", "[red]", "[bold]x", ":smile:", "a\\[b]")
LONG = Path("a folder [x]") / ("long" * 20)
COMMAND = f'mixtura generate {LONG} "..."'


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")


def row(name: str, perplexity: float) -> Row:
    quality = Quality(
        kl=0.5,
        kl_low=0.25,
        kl_high=1.0,
        equal_top=0.5,
        perplexity={"all": perplexity, **dict.fromkeys(ODD, 2.0)},
        kl_by_domain={},
    )
    return Row(
        name=name,
        label="",
        weights_bytes=1 << 20,
        accounted_bytes=2 << 20,
        active_bytes=1 << 10,
        quality=quality,
        tokens_per_second=12_345.6,
    )


def fitted(**changed: object) -> Fitted:
    one = Fitted(
        model="model [bf16]",
        out=LONG,
        budget_bytes=1 << 20,
        budget_kind="model",
        model_budget_bytes=1 << 20,
        runtime_bytes=1 << 20,
        context=4096,
        plan=Plan("sha256:0", ()),
        rows=(row("before", 3_040.3), row("chosen", 3_140.3)),
        notes=("[red] was left out",),
        commands={"mixtura": COMMAND},
    )
    return replace(one, **changed)


def test_names_in_brackets_and_large_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_fitted(fitted())
    out = capsys.readouterr().out
    for name in ODD:
        assert re.search(rf"^{re.escape(name)} +2 +2", out, re.MULTILINE), name
    assert re.search(r"^perplexity +3,040 +3,140 *$", out, re.MULTILINE)
    assert re.search(r"^tokens/s +12,346 +12,346 *$", out, re.MULTILINE)
    assert "e+0" not in out
    assert "note: [red] was left out\n" in out
    for line in (f"model   {LONG}", f"report  {LONG}/report.html", f"run     {COMMAND}   (mixtura)"):
        assert f"{line}\n" in out


def test_lines_to_copy_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
    print_fitted(fitted())
    assert f"run     {COMMAND}   (mixtura)\n" in terminal.getvalue()


def test_a_model_that_fits_is_named_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_fitted(fitted(plan=None, out=None))
    out = capsys.readouterr().out
    assert out.startswith("model [bf16] fits as it is: it takes 2.0 MiB")
    assert "for 4,096 tokens of context" in out


def test_an_estimate_names_the_model_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    option = PlanEstimate(
        name="unchanged",
        weights_bytes=1 << 20,
        accounted_bytes=2 << 20,
        active_bytes=1.0,
        tokens_per_second=3_040.3,
        fits=True,
    )
    sizes = ("budget", "model_budget", "runtime", "disk", "fitting", "smallest")
    print_estimate(
        Estimate(
            model="model [bf16]",
            context=64,
            seconds=1.0,
            limit_s=1.0,
            finishing_s=1.0,
            less=None,
            notes=("[red] is",),
            bytes_read=1,
            bytes_written=1,
            options=(option,),
            **{f"{name}_bytes": 1 << 20 for name in sizes},
        )
    )
    out = capsys.readouterr().out
    assert out.startswith("model [bf16]: what a fit would take\n")
    assert re.search(r"^unchanged .* 3,040 +yes *$", out, re.MULTILINE)
    assert "note: [red] is\n" in out


@pytest.mark.parametrize("stream", [_Terminal, io.StringIO])
def test_what_is_being_done_is_said_as_it_is(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", told := stream())
    with narrated() as notify:
        notify("reading [red] and [/code]")
    assert "reading [red] and [/code]" in told.getvalue()
