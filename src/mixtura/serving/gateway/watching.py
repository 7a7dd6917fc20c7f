"""What a gateway counts while it runs, and what its ledger says of the last day."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Final, final

import sqlalchemy as sa
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from mixtura.serving.engine.counting import FIRST_TOKEN_BOUNDS, Histogram
from mixtura.serving.gateway.ledger import CALLS, DECISIONS, FEEDBACK, Settled
from mixtura.types.models import PICO_PER_DOLLAR

DAY_S: Final = 86_400.0
_NUM_SPANS: Final = 24


@final
class Watch:
    """Sums since the process began; written and read by the server's loop."""

    def __init__(self) -> None:
        self.began = time.time()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.cost: Counter[str] = Counter()
        self.overrun: Counter[str] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.abstained: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.first: dict[str, Histogram] = defaultdict(lambda: Histogram(FIRST_TOKEN_BOUNDS))
        self.total: dict[str, Histogram] = defaultdict(lambda: Histogram(FIRST_TOKEN_BOUNDS))
        self.under_way = 0

    def called(self, model: str, call: Settled, charged: int) -> None:
        """A call was settled."""
        self.calls[model, call.outcome] += 1
        self.cost[model] += charged
        self.overrun[model] += call.cost - charged
        self.tokens[model, "read"] += call.input_tokens
        self.tokens[model, "written"] += call.output_tokens
        if call.outcome == "ok":
            if call.first_ms is not None:
                self.first[model].add(call.first_ms / 1000)
            if call.total_ms is not None:
                self.total[model].add(call.total_ms / 1000)

    def latencies(self) -> dict[str, dict[str, float | None]]:
        """Milliseconds until answers began and ended, by model; of the recent past."""

        def ms(one: Histogram, share: float) -> float | None:
            found = one.percentile(share)
            return None if found is None else round(found * 1000, 2)

        return {
            model: {
                "first_p50": ms(self.first[model], 0.5), "first_p99": ms(self.first[model], 0.99),
                "total_p50": ms(self.total[model], 0.5), "total_p99": ms(self.total[model], 0.99),
            }
            for model in sorted(set(self.first) | set(self.total))
        }  # fmt: skip


@final
class Metrics(Collector):
    """The same for Prometheus.

    Args:
        watch: what was counted.
        budgets: by key its budget, what it has spent and set aside, in pico-dollars.
        resting: seconds for which models and upstreams rest.
    """

    def __init__(
        self, watch: Watch, budgets: dict[str, tuple[int | None, int, int]], resting: dict[str, float]
    ) -> None:
        self._watch = watch
        self._budgets = budgets
        self._resting = resting

    def collect(self) -> Iterator[Any]:
        """Everything there is."""
        watch, name = self._watch, "mixtura_gateway"
        yield _counter(f"{name}_answers", "Requests by name and status.", ["asked", "status"], watch.answers)
        yield _counter(f"{name}_calls", "Calls by how they ended.", ["model", "outcome"], watch.calls)
        yield _counter(f"{name}_tokens", "Tokens of calls.", ["model", "what"], watch.tokens)
        yield _counter(
            f"{name}_abstained", "Prompts that no model was trusted with.", ["asked"], watch.abstained
        )
        yield _counter(f"{name}_cache_hits", "Answers given again.", ["kind"], watch.cached)
        for what, found in (("cost", watch.cost), ("overrun", watch.overrun)):
            dollars = {key: value / PICO_PER_DOLLAR for key, value in found.items()}
            yield _counter(f"{name}_{what}_dollars", f"The {what} of calls.", ["model"], dollars)
        yield GaugeMetricFamily(f"{name}_under_way", "Requests that are being answered.", watch.under_way)
        for what, histograms in (("first", watch.first), ("total", watch.total)):
            words = (
                f"Seconds to the {'first content' if what == 'first' else 'end'} of calls that were answered."
            )
            family = HistogramMetricFamily(f"{name}_{what}_seconds", words, labels=["model"])
            for model, one in histograms.items():
                family.add_metric([model], one.cumulative(), one.sum_s)
            yield family
        money = GaugeMetricFamily(f"{name}_key_dollars", "Money of keys.", labels=["key", "what"])
        for key, (budget, spent, reserved) in self._budgets.items():
            for what, amount in (("budget", budget), ("spent", spent), ("reserved", reserved)):
                if amount is not None:
                    money.add_metric([key, what], amount / PICO_PER_DOLLAR)
        yield money
        rests = GaugeMetricFamily(
            f"{name}_resting_seconds", "What is left alone, and for how long.", labels=["what"]
        )
        for what, seconds in self._resting.items():
            rests.add_metric([what], seconds)
        yield rests


def _counter(name: str, words: str, labels: list[str], found: Any) -> CounterMetricFamily:
    family = CounterMetricFamily(name, words, labels=labels)
    for key, value in found.items():
        family.add_metric([str(one) for one in key] if isinstance(key, tuple) else [str(key)], value)
    return family


def last_day(connection: sa.Connection) -> dict[str, Any]:
    """What the ledger says of the last day: calls and money by model and hour, decisions, feedback."""
    now = time.time()
    since = now - DAY_S
    return {
        "models": _models(connection, since),
        "hours": _hours(connection, since, now),
        "decisions": _decisions(connection, since),
    }


def _models(connection: sa.Connection, since: float) -> list[dict[str, Any]]:
    ok = sa.func.sum(sa.case((CALLS.c.outcome == "ok", 1), else_=0))
    rows = connection.execute(
        sa.select(
            CALLS.c.model, sa.func.count().label("calls"), ok.label("ok"),
            sa.func.sum(CALLS.c.cost).label("cost"),
            sa.func.sum(CALLS.c.overrun).label("overrun"),
            sa.func.sum(CALLS.c.input_tokens).label("read"),
            sa.func.sum(CALLS.c.output_tokens).label("written"),
        ).where(CALLS.c.sent >= since).group_by(CALLS.c.model).order_by(CALLS.c.model)
    ).mappings()  # fmt: skip
    scores = _scores(connection, since)
    return [
        {key: _plain(value) for key, value in row.items()}
        | scores.get(row["model"], {"score": None, "judged": 0})
        for row in rows
    ]


def _scores(connection: sa.Connection, since: float) -> dict[str, dict[str, Any]]:
    """The mean score of each model's answers; what several models answered together is no single one's."""
    last = (
        sa.select(CALLS.c.request, sa.func.min(CALLS.c.model).label("model"))
        .where(CALLS.c.outcome == "ok", CALLS.c.sent >= since)
        .group_by(CALLS.c.request).having(sa.func.min(CALLS.c.model) == sa.func.max(CALLS.c.model)).subquery()
    )  # fmt: skip
    rows = connection.execute(
        sa.select(last.c.model, sa.func.avg(FEEDBACK.c.score), sa.func.count())
        .join(FEEDBACK, FEEDBACK.c.request == last.c.request).group_by(last.c.model)
    ).all()  # fmt: skip
    return {model: {"score": float(score), "judged": int(num)} for model, score, num in rows}


def _hours(connection: sa.Connection, since: float, now: float) -> list[dict[str, Any]]:
    """Calls and money in each hour up to now, by model."""
    place = sa.cast(sa.func.floor((CALLS.c.sent - since) / (DAY_S / _NUM_SPANS)), sa.Integer)
    rows = connection.execute(
        sa.select(place, CALLS.c.model, sa.func.count(), sa.func.sum(CALLS.c.cost))
        .where(CALLS.c.sent >= since, CALLS.c.sent <= now).group_by(place, CALLS.c.model)
    ).all()  # fmt: skip
    return [
        {"hour": min(int(at), _NUM_SPANS - 1), "model": model, "calls": int(num), "cost": int(cost)}
        for at, model, num, cost in rows
    ]


def _decisions(connection: sa.Connection, since: float) -> list[dict[str, Any]]:
    rows = connection.execute(
        sa.select(DECISIONS.c.asked, DECISIONS.c.model, DECISIONS.c.how, sa.func.count())
        .where(DECISIONS.c.at >= since)
        .group_by(DECISIONS.c.asked, DECISIONS.c.model, DECISIONS.c.how)
        .order_by(DECISIONS.c.asked, DECISIONS.c.model, DECISIONS.c.how)
    ).all()  # fmt: skip
    return [{"asked": asked, "model": model, "how": how, "num": int(num)} for asked, model, how, num in rows]


def _plain(value: Any) -> Any:
    """Sums as numbers: databases give some as decimals."""
    return value if isinstance(value, str) or value is None else int(value)


def outcomes(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """Rows for `mixtura route`: what was decided, what it cost, how good it was where somebody said so."""
    same = CALLS.c.request == DECISIONS.c.request
    cost = sa.select(sa.func.sum(CALLS.c.cost)).where(same).scalar_subquery()
    # Where another model answered in place of the chosen one, its score says nothing of the choice.
    by_it = sa.exists().where(same, CALLS.c.model == DECISIONS.c.model, CALLS.c.outcome == "ok")
    rows = connection.execute(
        sa.select(DECISIONS, FEEDBACK.c.score, cost.label("cost"))
        .outerjoin(FEEDBACK, FEEDBACK.c.request == DECISIONS.c.request)
        .where(by_it, DECISIONS.c.prompt.is_not(None)).order_by(DECISIONS.c.at)
    ).mappings()  # fmt: skip
    for row in rows:
        found = {
            **json.loads(row["labels"]),
            "id": row["request"],
            "prompt": row["prompt"],
            "model": row["model"],
        }
        if row["score"] is not None:
            found["score"] = row["score"]
        if row["cost"] is not None:
            found["cost"] = int(row["cost"]) / PICO_PER_DOLLAR
        if row["propensity"] is not None:
            found["propensity"] = row["propensity"]
        yield found
