"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from mixtura.serving.watching import Watch

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(watch: Watch) -> bytes:
    """All metrics in Prometheus' text format."""
    return exposition(_Metrics(watch))


def exposition(collector: Any) -> bytes:
    """What a collector has, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


@final
class _Metrics(Collector):
    """Reads the counts when they are asked for; nothing is counted twice."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Any]:
        yield from self._requests()
        yield from self._tokens()
        yield from self._memory()
        yield from self._experts()

    def _requests(self) -> Iterator[Any]:
        engine, counts = self._watch.engine, self._watch.engine.counts
        finished = CounterMetricFamily("mixtura_requests", "Requests by how they ended.", labels=["outcome"])
        for how, number in counts.finished.items():
            finished.add_metric([how], number)
        yield finished
        yield GaugeMetricFamily("mixtura_requests_running", "Requests that run now.", engine.num_running)
        yield GaugeMetricFamily("mixtura_requests_waiting", "Requests that wait.", engine.num_waiting)
        for name, what, one in (
            ("mixtura_time_to_first_token_seconds", "From a request to its first token.", counts.first_token),
            ("mixtura_time_between_tokens_seconds", "From one token to the next.", counts.between),
        ):
            yield HistogramMetricFamily(name, what, buckets=one.cumulative(), sum_value=one.sum_s)

    def _tokens(self) -> Iterator[Any]:
        counts = self._watch.engine.counts
        for name, what, number in (
            ("mixtura_prompt_tokens", "Tokens of prompts that were read.", counts.prompt_tokens),
            ("mixtura_cached_tokens", "Tokens of prompts that were not read again.", counts.cached_tokens),
            ("mixtura_generated_tokens", "Tokens of answers.", counts.new_tokens),
            ("mixtura_steps", "Passes that gave running texts a token each.", counts.steps),
            ("mixtura_step_texts", "Texts in these passes, all told.", counts.step_rows),
        ):
            yield CounterMetricFamily(name, what, number)

    def _memory(self) -> Iterator[Any]:
        sizes = GaugeMetricFamily("mixtura_memory_bytes", "Memory by what it is for.", labels=["part"])
        for part, size in self._watch.memory().items():
            if size is not None:
                sizes.add_metric([part], size)
        yield sizes

    def _experts(self) -> Iterator[Any]:
        loads = CounterMetricFamily(
            "mixtura_expert_tokens", "Tokens that each expert had.", labels=["layer", "expert"]
        )
        for layer, tokens in self._watch.loads():
            for expert, number in enumerate(tokens):
                loads.add_metric([str(layer), str(expert)], number)
        yield loads
        seen = self._watch.experts()
        if seen is None:
            return
        for name, what, key in (
            ("mixtura_experts_needed", "Experts that calls of layers needed.", "needed"),
            ("mixtura_expert_hits", "Those of them that were in memory.", "hits"),
            ("mixtura_demanded_bytes", "Read because an expert was needed and not there.", "demanded_bytes"),
            ("mixtura_prefetched_bytes", "Read because an expert was guessed.", "prefetched_bytes"),
            ("mixtura_wasted_bytes", "Of the latter, those that were not needed.", "wasted_bytes"),
        ):
            yield CounterMetricFamily(name, what, seen[key])
        yield CounterMetricFamily(
            "mixtura_waited_seconds", "Layers stood still for reads.", seen["waited_ms"] / 1000
        )
