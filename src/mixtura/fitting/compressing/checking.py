"""Refusing, before anything is read for long or written, what could not be done in the end."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.applying.checking import check_source
from mixtura.checkpoints.applying.staging import check_place
from mixtura.checkpoints.gguf.write import check_out
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.droppable import least_kept
from mixtura.errors import BudgetError, OutputError, SettingError, UnsupportedModelError, UserError, suggest
from mixtura.fitting.compressing.records import FORMATS, KIND_OF, Choices
from mixtura.fitting.publishing import beside
from mixtura.methods import create, header
from mixtura.methods.quantizers import Quantizer
from mixtura.methods.trimmers import Trimmer
from mixtura.report import counted
from mixtura.report.units import format_bytes

_SLACK_BYTES = 16 << 20
# Tokens that an expert is to see on average.
_LEAST_ROWS = 8


@final
@dataclass(frozen=True, slots=True)
class Methods:
    """The methods that choices name, made; None where they name none."""

    pruner: Any
    merger: Any
    trimmer: Trimmer | None
    quantizer: Quantizer | None
    quantizer_settings: dict[str, Any]

    @property
    def reducer(self) -> Any:
        """What makes experts fewer."""
        return self.pruner if self.merger is None else self.merger


def make_methods(choices: Choices) -> Methods:
    """The methods, with their settings checked.

    Raises:
        UserError: choices that say nothing, contradict each other, or name what there is not.
    """
    _check_neurons(choices)
    _check_choices(choices)
    made: dict[str, Any] = {}
    given: dict[str, dict[str, Any]] = {}
    for choice, kind in KIND_OF.items():
        name = choices.method(choice)
        given[choice] = dict(choices.settings.get(choice, {}))
        if choice == "quantize" and choices.bits is not None:
            if not math.isfinite(choices.bits):
                raise SettingError(f"--bits must be a number such as 4 or 2.25, got {choices.bits}")
            whole = int(choices.bits) == choices.bits
            given[choice]["bits"] = int(choices.bits) if whole else choices.bits
        if name is not None:
            drawn = {one.name: choices.seed for one in header(kind, name).settings if one.name == "seed"}
            made[choice] = create(kind, name, **{**drawn, **given[choice]})
    return Methods(
        made.get("prune"),
        made.get("merge"),
        made.get("neurons"),
        made.get("quantize"),
        given["quantize"],
    )


def _check_neurons(choices: Choices) -> None:
    """Refuse what does not go with taking neurons out of experts."""
    if choices.neurons is None:
        if choices.keep_neurons is not None:
            raise SettingError(
                "--keep-neurons says how many neurons --neurons leaves; give --neurons METHOD as well"
            )
        return
    if choices.keep_neurons is None or not 0 < choices.keep_neurons < 1:
        raise SettingError(
            f"--neurons needs --keep-neurons, the share of every expert's neurons that is to be left, above "
            f"0 and below 1, got {choices.keep_neurons}"
        )
    others = [f"--{one}" for one in ("prune", "merge", "quantize") if choices.method(one) is not None]
    others += ["--rest-bits"] if choices.rest_bits is not None else []
    if others:
        raise SettingError(
            f"--neurons goes alone, and {' and '.join(others)} came with it; its result is an ordinary "
            f"checkpoint, so compress that once more"
        )


def _check_choices(choices: Choices) -> None:
    reducers = [f"--{choice}" for choice in ("prune", "merge") if choices.method(choice) is not None]
    if len(reducers) == 2:
        raise SettingError(
            "--prune and --merge contradict each other: both leave the share of --keep, one by dropping and "
            "one by averaging; give one of them"
        )
    if reducers and choices.keep is None:
        raise SettingError(f"{reducers[0]} needs --keep, the share of the experts that is to be left, as 0.5")
    if not reducers and choices.keep is not None:
        raise SettingError("--keep says how many experts --prune or --merge leave; give one of these as well")
    if choices.prune is None and choices.servable:
        raise SettingError("--servable rounds what --prune leaves; give --prune METHOD as well")
    if choices.keep is not None and not 0 < choices.keep < 1:
        raise SettingError(
            f"--keep is the share of the experts that stays, above 0 and below 1, got {choices.keep:g}"
        )
    if choices.quantize is None and choices.bits is not None:
        raise SettingError("--bits is for a quantizer; give --quantize METHOD as well")
    nothing = choices.quantize is None and choices.rest_bits is None and choices.neurons is None
    if not reducers and nothing:
        raise SettingError(
            "there is nothing to do: give --prune METHOD --keep SHARE, --merge METHOD --keep SHARE, "
            "--quantize METHOD --bits BITS, --rest-bits 8, or several of them, or --neurons METHOD "
            "--keep-neurons SHARE; `mixtura methods` lists the methods"
        )
    if choices.rest_bits not in (None, 8, 4):
        raise SettingError(
            f"--rest-bits is 8 or 4, for what is outside the routed experts, got {choices.rest_bits}"
        )
    for choice, settings in choices.settings.items():
        if choice not in KIND_OF:
            raise SettingError(f"there are no settings of {choice!r}; {suggest(choice, KIND_OF)}")
        if settings and choices.method(choice) is None:
            raise SettingError(f"settings of --{choice} are given, and no --{choice}; name its method")
    if choices.tokens < 1 or choices.length < 2:
        raise SettingError(
            f"--tokens must be at least 1 and --length at least 2, got {choices.tokens} and {choices.length}"
        )
    _check_format(choices)


def _check_format(choices: Choices) -> None:
    if choices.to_format not in FORMATS:
        raise SettingError(f"there is no format {choices.to_format!r}; {suggest(choices.to_format, FORMATS)}")
    if choices.to_format == "gguf" and choices.rest_bits is not None:
        raise SettingError(
            "--rest-bits stores weights in mixtura's own format, which llama.cpp does not read; for a GGUF "
            "file leave it out and give llama.cpp's types with --type, such as --type attention=q8_0"
        )
    if choices.to_format == "gguf" and choices.quantize is not None:
        raise SettingError(
            "--quantize stores experts in mixtura's own format, which llama.cpp does not read; for a GGUF "
            "file leave it out and give llama.cpp's types with --type, such as --type q4_k"
        )
    if choices.to_format == "gguf" and choices.merge is not None:
        raise SettingError(
            "--merge keeps a row of the router for every expert, which no GGUF file can say; leave --format "
            "out, or use --prune"
        )
    if choices.to_format == "compressed-tensors" and choices.rest_bits is not None:
        raise SettingError(
            "--rest-bits stores weights in mixtura's own format, and --format compressed-tensors packs "
            "routed experts alone; leave one of them out"
        )
    if choices.to_format == "compressed-tensors" and choices.merge is not None:
        raise SettingError(
            "--merge keeps a row of the router for every expert, which no ordinary checkpoint can say; leave "
            "--format out, or use --prune"
        )
    if choices.types and choices.to_format != "gguf":
        raise SettingError("--type is for a GGUF file; give --format gguf as well")


def check_places(choices: Choices) -> None:
    """Refuse a source that no plan is applied to, and a place that cannot be written.

    Raises:
        UserError: says which, and what to do.
    """
    check_source(choices.model)
    if choices.to_format == "gguf":
        check_out(choices.out)
    else:
        check_place(choices.out, choices.model)


def check_keep(choices: Choices, view: CheckpointView) -> int | None:
    """How many experts a layer is to have at most, if they are to become fewer.

    Raises:
        BudgetError: fewer than a token chooses from.
        UnsupportedModelError: experts cannot be made fewer at all.
    """
    if choices.keep is None:
        return None
    most = max(layer.num_experts for layer in view.layers)
    kept = math.floor(choices.keep * most + 1e-9)
    for layer in view.layers:
        if layer.hash_routed and choices.prune is not None:
            raise UnsupportedModelError(
                f"a table, not a score, chooses the experts of layer {layer.index}, so none of them can be "
                f"dropped; use --quantize instead"
            )
    least = max(_least(choices, layer) for layer in view.layers)
    if kept < least:
        raise BudgetError(
            f"--keep {choices.keep:g} leaves {counted(kept, 'expert')} of {most}, and routing needs at least "
            f"{least} in each layer (the experts that a token chooses, in every group); give at least --keep "
            f"{math.ceil(1000 * least / most) / 1000:g}"
        )
    return kept


def _least(choices: Choices, layer: LayerView) -> int:
    # Rows of the router stay where experts are merged: one expert is enough to choose from.
    return least_kept(layer) if choices.prune is not None else 1


def check_text(view: CheckpointView, num_tokens: int) -> None:
    """Refuse calibration text that cannot reach the experts.

    Raises:
        UserError: an expert would see next to none of it.
    """
    needed = max(math.ceil(_LEAST_ROWS * layer.num_experts / layer.top_k) for layer in view.layers)
    if num_tokens < needed:
        raise UserError(
            f"the calibration text is too short: an expert would be given fewer than {_LEAST_ROWS} of its "
            f"{counted(num_tokens, 'token')} on average, which says nothing of it; give at least {needed} "
            f"tokens of text (better {100 * needed}), and as many with --tokens"
        )


def check_room(
    choices: Choices, view: CheckpointView, methods: Methods, kept: int | None, num_tokens: int
) -> None:
    """Refuse a disk that cannot hold the result and what is kept on the way.

    Raises:
        OutputError: says how much is missing.
    """
    experts = result = 0
    for layer in view.layers:
        number = min(kept or layer.num_experts, layer.num_experts)
        tensors = layer.native_expert(0)
        own = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if methods.quantizer is not None:
            matrices = [m.mT if layer.layout.transposed else m for m in (tensors.up, tensors.down)]
            own = sum(methods.quantizer.num_bytes(*matrix.shape) for matrix in matrices)
        experts += layer.num_experts * sum(t.nbytes for t in tensors if t is not None)
        result += number * own
    rest = max(view.num_bytes - experts, 0)
    # What every layer put out, so that stopped work goes on; rounded experts before they are written.
    way = len(view.layers) * num_tokens * view.layers[0].shape.d_model * 4
    way += result if methods.quantizer is not None else 0
    needed = rest + result + way + _SLACK_BYTES
    place = next(parent for parent in choices.out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free + _used(beside(choices.out))
    if free < needed:
        raise OutputError(
            f"{place} has {format_bytes(free)} free, and writing {choices.out.name} takes about "
            f"{format_bytes(needed)} while it lasts ({format_bytes(rest + result)} of it for good); free "
            f"{format_bytes(needed - free)} there or choose another place with --out"
        )


def _used(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
