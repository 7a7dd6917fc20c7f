"""What a compression has to say for itself: experts seldom seen, what was left alone, how to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.errors import counted_names
from mixtura.fitting.compressing.records import Choices
from mixtura.report import counted
from mixtura.types import Plan
from mixtura.types.trace import Trace

# Fewer tokens than this say little of what an expert does.
FEW_TOKENS = 16


def few_of(loads: Mapping[int, Mapping[int, int]]) -> dict[int, dict[int, int]]:
    """By decoder layer, the experts that few tokens reached, with how many did."""
    few = {layer: {e: n for e, n in of_layer.items() if n < FEW_TOKENS} for layer, of_layer in loads.items()}
    return {layer: of_layer for layer, of_layer in few.items() if of_layer}


def few_by_trace(trace: Trace, plan: Plan) -> dict[int, dict[int, int]]:
    """The same of the experts that a plan leaves, by what was observed before."""
    dropped = plan.dropped()
    loads = {}
    for layer in trace.layers:
        gone = set(dropped.get(layer.index, ()))
        loads[layer.index] = {e: int(n) for e, n in enumerate(layer.load.tolist()) if e not in gone}
    return few_of(loads)


def merged_groups(plan: Plan) -> dict[int, tuple[tuple[int, ...], ...]]:
    """By decoder layer, the groups of experts that became one."""
    return {layer: tuple(merge.experts for merge in merges) for layer, merges in plan.merged().items()}


def notes_of(choices: Choices, view: CheckpointView, plan: Plan) -> tuple[str, ...]:
    """What was not done as one might expect."""
    return tuple(_notes(choices, view, plan))


def _notes(choices: Choices, view: CheckpointView, plan: Plan) -> Iterator[str]:
    if choices.rest_bits is None:
        yield (
            "routed experts alone were changed: attention, shared experts, embeddings and head are as they "
            "were"
        )
    else:
        yield (
            f"{counted(len(plan.matrices()), 'tensor')} outside the routed experts were rounded to "
            f"{choices.rest_bits} bits without calibration"
        )
    if choices.keep is not None and choices.prune is not None:
        left = {layer.num_experts - len(plan.dropped().get(layer.index, ())) for layer in view.layers}
        most = max(layer.num_experts for layer in view.layers)
        if max(left) != int(choices.keep * most + 1e-9):
            told = ", ".join(map(str, sorted(left)))
            yield (
                f"{told} of {counted(most, 'expert')} stay in a layer, not {choices.keep:.0%}: groups of a "
                f"router keep the same number each, and --servable takes some numbers only"
            )
    if plan.merged():
        yield (
            "the router still chooses among all experts, those of a group being one: so what was merged is "
            "exact, and the result runs in mixtura alone"
        )
    beyond = view.layers_beyond if isinstance(view, DiskView) else ()
    if beyond:
        yield f"layers that transformers does not build were not calibrated: {counted_names(beyond)}"


def commands(choices: Choices, *, ordinary: bool) -> tuple[str, ...]:
    """How the result is run."""
    out = choices.out
    if choices.to_format == "gguf":
        return (f'llama-cli -m {out} -p "..."',)
    if choices.to_format == "compressed-tensors":
        return (f"transformers chat {out}", f"vllm serve {out}")
    ours = (f'mixtura generate {out} "..."',)
    return (*ours, f"vllm serve {out}", f"mixtura export {out} --out {out}.gguf") if ordinary else ours
