"""Does a plan fit a model? Found out before anything is read or written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mixtura.checkpoints.applying.trimming import check_trims
from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.viewing.base import LayerView, ModelView
from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods import create
from mixtura.types import Drop, Merge, Plan, Quantize, QuantizeMatrix, Trim

# Of shares that were written as decimal numbers.
_SUM_TOLERANCE = 1e-6


def check_source(source: Path) -> None:
    """Refuse a checkpoint that no plan is applied to.

    Raises:
        UnsupportedModelError: a plan was applied to it already, or what lies beside it changes the model.
    """
    if is_packed(source):
        raise UnsupportedModelError(
            f"{source} is already in the mixtura format; apply one plan with all changes to the original"
        )
    require_alone(source, "the result")


def check_plan(view: ModelView, plan: Plan) -> dict[int, tuple[int, ...]]:
    """The experts each MoE layer keeps, ascending, by the layer's number.

    Raises:
        UserError: an action is of a kind that is not applied, names a layer or expert that is not
            there, drops and quantizes the same expert, or leaves a router too few experts.
        SettingError: a quantizer's setting is unknown or out of range.
        UnknownNameError: there is no quantizer of that name.
    """
    for action in plan.actions:
        if isinstance(action, Drop):
            for expert in action.experts:
                _check_expert(view.layer(action.layer), expert)
        elif isinstance(action, Quantize):
            _check_expert(view.layer(action.layer), action.expert)
        elif isinstance(action, Merge):
            _check_merge(view.layer(action.layer), action)
        elif isinstance(action, Trim):
            _check_expert(view.layer(action.layer), action.expert)
        elif not isinstance(action, QuantizeMatrix):
            raise UserError(
                f"a plan's action {action.kind!r} is not applied yet; there are: drop, merge, quantize, "
                "quantize_matrix, trim"
            )
    stores: tuple[Quantize | QuantizeMatrix, ...] = (*plan.quantized().values(), *plan.matrices().values())
    distinct = {(a.quantizer, repr(sorted(a.settings.items()))): a for a in stores}
    for stored in distinct.values():
        create("quantizers", stored.quantizer, **stored.settings)
    dropped = plan.dropped()
    for index, expert in plan.quantized():
        if expert in dropped.get(index, ()):
            raise UserError(
                f"the plan both drops and quantizes expert {expert} of layer {index}; do one of them"
            )
    _check_merges(plan)
    check_trims(view, plan)
    kept = {}
    for layer in view.layers:
        gone = set(dropped.get(layer.index, ()))
        kept[layer.index] = tuple(e for e in range(layer.num_experts) if e not in gone)
        if gone:
            _check_drop(layer, kept[layer.index])
    return kept


def _check_expert(layer: LayerView, expert: int) -> None:
    if not 0 <= expert < layer.num_experts:
        raise UserError(
            f"the plan names expert {expert} of layer {layer.index}, which has 0 to {layer.num_experts - 1}; "
            f"is it a plan for another model?"
        )


def _check_merge(layer: LayerView, merge: Merge) -> None:
    """Raise `UserError` where a group cannot be averaged."""
    for expert in merge.experts:
        _check_expert(layer, expert)
    if len(merge.experts) < 2 or len(set(merge.experts)) < len(merge.experts):
        raise UserError(
            f"a merge in layer {merge.layer} names the experts {merge.experts}; give two or more, each once"
        )
    if len(merge.shares) != len(merge.experts) or abs(sum(merge.shares) - 1) > _SUM_TOLERANCE:
        raise UserError(
            f"a merge in layer {merge.layer} has the shares {merge.shares}; give one for each of its "
            f"{len(merge.experts)} experts, which sum to one"
        )
    if not all(share >= 0 for share in merge.shares):
        raise UserError(f"a merge in layer {merge.layer} has a share below 0: {merge.shares}")


def _check_merges(plan: Plan) -> None:
    """Raise `UserError` where an expert is merged and something else, too."""
    dropped, quantized = plan.dropped(), plan.quantized()
    for index, merges in plan.merged().items():
        members = Counter(expert for merge in merges for expert in merge.experts)
        first = {merge.experts[0] for merge in merges}
        for expert, times in members.items():
            if times > 1:
                raise UserError(f"the plan merges expert {expert} of layer {index} twice; do so once")
            if expert in dropped.get(index, ()):
                raise UserError(
                    f"the plan both drops and merges expert {expert} of layer {index}; do one of them"
                )
            if expert not in first and (index, expert) in quantized:
                raise UserError(
                    f"the plan quantizes expert {expert} of layer {index}, which is stored as the first of "
                    f"its group; quantize that one"
                )


def _check_drop(layer: LayerView, kept: tuple[int, ...]) -> None:
    """Raise `UserError` where the router could not work with the experts that are left."""
    if layer.hash_routed:
        raise UserError(
            f"a table, not a score, chooses the experts of layer {layer.index}, so none of them can be "
            f"dropped; quantize them instead"
        )
    if len(kept) < layer.top_k:
        raise UserError(
            f"the plan leaves layer {layer.index} {len(kept)} experts, but its router chooses {layer.top_k} "
            f"for each token; drop at most {layer.num_experts - layer.top_k} there"
        )
    if layer.num_groups == 1:
        return
    size = layer.num_experts // layer.num_groups
    left = Counter(expert // size for expert in kept)
    if len(left) < layer.num_groups or len(set(left.values())) > 1:
        raise UserError(
            f"the router of layer {layer.index} chooses among {layer.num_groups} groups of {size} experts; "
            f"drop the same number in each group"
        )
    # Routers score a group by its best two experts, and must find top_k experts in the groups they take.
    needed = max(2, -(-layer.top_k // layer.top_groups))
    if left[0] < needed:
        raise UserError(
            f"the plan leaves each group of layer {layer.index} {left[0]} experts, but its router needs "
            f"{needed}; drop at most {size - needed} in each group"
        )
