"""Forecast a noisy wave with its uncertainty, and draw nine tenths of what may come beside what came.

Run it as `python examples/forecast_intervals.py [page.html]`. The series is sin(2 pi t / 24), a second wave
that comes and goes, and noise that remembers itself; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mixtura import estimators
from mixtura.report.chart import Series, line_svg
from mixtura.report.page import Section, facts, page

PAST, FUTURE, STEP = 32, 8, 7


def series(num: int, seed: int = 0) -> np.ndarray:
    """The wave."""
    time, noise = np.arange(num), np.random.default_rng(seed).normal(size=num)
    for t in range(1, num):
        noise[t] += 0.8 * noise[t - 1]
    on = (time // 60) % 2
    return np.sin(2 * np.pi * time / 24) + 0.5 * on * np.sin(2 * np.pi * time / 7) + 0.2 * noise


def main(out: Path) -> None:
    """Learn, forecast the last tenth, and write the page."""
    past, future = estimators.windows(series(700), past=PAST, future=FUTURE)
    num = 560
    model = estimators.MultiExpertLdl(epochs=20).fit(past[:num], future[:num])
    later, came = past[num + FUTURE :], future[num + FUTURE :]
    drawn = model.sample(later, 200)
    low, middle, high = np.quantile(drawn, (0.05, 0.5, 0.95), axis=0)
    inside = float(((low < came) & (came < high)).mean())
    print(
        f"R² {model.score(later, came):.3f}; {inside:.1%} of what came is within nine tenths of the samples"
    )
    time = range(len(came))
    curves = {"what came": came, "median": middle, "lowest twentieth": low, "highest twentieth": high}
    picture = line_svg(
        [Series(name, list(zip(time, v[:, STEP].tolist(), strict=True))) for name, v in curves.items()],
        title=f"{STEP + 1} steps ahead",
        x_label="step",
        y_label="value",
    )
    shares = model.route(later).scores.mean(0).tolist()
    names = ("trend", "season", "steps", "volatility")
    weights = facts({name: f"{share:.1%}" for name, share in zip(names, shares, strict=True)})
    sections = [Section("Forecast", [picture]), Section("Mean weights of the experts", [weights])]
    out.write_text(page("A forecast with its uncertainty", sections), encoding="utf-8")
    print(f"the page is {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "forecast.html"))
