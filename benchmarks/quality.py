"""Measure how far a model is from itself when all its routed experts are stored in one type.

Each row stores every expert of a trained model (the specimen, or ``--model``) by one quantizer, puts what is
read back in the experts' place and measures, on held-out text, the KL divergence to the original in nats a
token. Rows are mixtura's own quantizers and others' (llama.cpp's types through its own library, HQQ), with
and without what calibration text says of the experts' inputs. No text is in both.

    python benchmarks/quality.py                        # everything that is installed, about 15 minutes
    python benchmarks/quality.py --rows gptq Q4_K       # rows whose names begin so

llama.cpp comes with ``pip install llama-cpp-python``, HQQ with ``pip install hqq``; rows of what is not
installed are left out. Rows measured anew take the place of those kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from layer import machine
from torch import Tensor
from torch.nn import functional as F

import mixtura
from mixtura.checkpoints.gguf.libraries import LlamaLibrary, llama_library
from mixtura.checkpoints.gguf.types import NEED_IMPORTANCE, StorageType, storage_type
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.view import LayerView
from mixtura.data import specimen
from mixtura.fitting.quality import HeldOut, Scores, join, score_chunk, summarise
from mixtura.fitting.texts import Texts, load_texts
from mixtura.kernels import ExpertMath, ExpertTensors
from mixtura.kernels.backend import math_of
from mixtura.kernels.matmul import linear
from mixtura.methods import create
from mixtura.running.observing.attach import attached
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

RESULTS = Path(__file__).parent / "results" / "quality.json"
CALIBRATION_TOKENS, HELD_OUT_TOKENS, LENGTH = 65_536, 15_300, 512
# Weights and activations that nothing rounds but the quantizer, so that small differences are its own.
DTYPE = torch.float32
# The types of llama.cpp's files, and HQQ's bits and group sizes.
GGML_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
HQQ = ((8, 64), (4, 64), (3, 64), (2, 64), (2, 32))
# mixtura's own, by name and settings: add a row here.
OURS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("round_to_nearest", {"bits": 8}),
    ("round_to_nearest", {"bits": 4}),
    ("round_to_nearest", {"bits": 2}),
    ("gptq", {"bits": 8}),
    ("gptq", {"bits": 4}),
    ("gptq", {"bits": 2}),
    *(("trellis", {"bits": bits}) for bits in (6, 5, 4, 3.5, 3, 2.5, 2, 1.5)),
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to store a matrix.

    Attributes:
        name: what it is, with its settings.
        by: whose it is.
        calibrated: whether it heeds what calibration text says of the inputs.
        rounded: the matrix ``[R, C]`` as it is read back; its second argument is the mean of
            ``x xᵀ`` over the rows ``x`` the matrix is multiplied with, ``[C, C]``.
        bits: bits a weight of a matrix of so many rows and columns takes.
    """

    name: str
    by: str
    calibrated: bool
    rounded: Callable[[Tensor, Tensor], Tensor]
    bits: Callable[[int, int], float]


def ours(name: str, settings: Mapping[str, Any], calibrated: bool) -> Contender:
    """One of mixtura's quantizers."""
    quantizer = create("quantizers", name, **settings)

    def rounded(weight: Tensor, moments: Tensor) -> Tensor:
        return quantizer.decode(quantizer.encode(weight, moments if calibrated else None), weight.dtype)

    said = ", ".join(f"{key}={value}" for key, value in settings.items())
    return Contender(f"{name} {said}", "mixtura", calibrated, rounded, quantizer.bits_per_weight)


def llama(library: LlamaLibrary) -> Iterator[Contender]:
    """Every type of llama.cpp, with importance and, where it can do without, without."""
    for name in GGML_TYPES:
        kind = storage_type(name)
        for calibrated in (False, True):
            if not calibrated and kind.name in NEED_IMPORTANCE:
                continue

            def rounded(
                weight: Tensor, moments: Tensor, kind: StorageType = kind, calibrated: bool = calibrated
            ) -> Tensor:
                rows, cols = weight.shape
                # Its blocks lie in one row; a short row ends in zeros.
                wide = F.pad(weight, (0, -cols % kind.block))
                importance = F.pad(moments.diagonal(), (0, -cols % kind.block)) if calibrated else None
                codes = library.encode(wide, kind, importance)
                return library.decode(codes, kind, rows, wide.shape[1])[:, :cols].to(weight.dtype)

            yield Contender(name, "llama.cpp", calibrated, rounded, lambda rows, cols, kind=kind: kind.bits)


def hqq() -> Iterator[Contender]:
    """Half-quadratic quantization, its own code with its own defaults but the bits and the groups."""
    if importlib.util.find_spec("hqq") is None:
        return
    from hqq.core.quantize import Quantizer

    for bits, group in HQQ:

        def rounded(weight: Tensor, moments: Tensor, bits: int = bits, group: int = group) -> Tensor:
            del moments
            codes, meta = Quantizer.quantize(
                weight.float(), nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=DTYPE
            )
            return Quantizer.dequantize(codes, meta).reshape(weight.shape).to(weight.dtype)

        # A scale and a zero of 16 bits a group.
        width = bits + 32 / group
        name = f"HQQ bits={bits}, group_size={group}"
        yield Contender(name, "HQQ", False, rounded, lambda rows, cols, width=width: width)


def contenders(ggml: Path | None) -> list[Contender]:
    """All rows that what is installed can give."""
    found = [ours(name, settings, calibrated) for name, settings in OURS for calibrated in heeded(name)]
    library = llama_library() if ggml is None else LlamaLibrary(ggml)
    return found + ([] if library is None else list(llama(library))) + list(hqq())


def heeded(name: str) -> tuple[bool, ...]:
    """Without and with calibration, where one of ours heeds it."""
    return (False,) if name == "round_to_nearest" else (False, True)


@dataclass(slots=True)
class Moments:
    """Adds up ``x xᵀ`` of what each expert's two matrices are multiplied with, in one layer.

    An `mixtura.kernels.AssignmentObserver`.
    """

    layer: LayerView
    math: ExpertMath
    up: Tensor = field(init=False)
    down: Tensor = field(init=False)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        shape = self.layer.shape
        self.up = torch.zeros(shape.num_experts, shape.d_model, shape.d_model)
        self.down = torch.zeros(shape.num_experts, shape.d_expert, shape.d_expert)

    def start(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Nothing is asked of whole batches."""

    def expert(
        self, expert: int, token_ids: Tensor, weights: Tensor, inputs: Tensor, outputs: Tensor
    ) -> None:
        """Add an expert's rows."""
        del weights, outputs
        tensors = self.layer.native_expert(expert)
        bias = None if tensors.up_bias is None else tensors.up_bias.to(inputs.dtype)
        matrix = self.math.matrix(tensors.up.to(inputs.dtype))
        hidden = self.math.activation(linear(inputs, matrix, bias))
        self.up[expert] += inputs.float().T @ inputs.float()
        self.down[expert] += hidden.float().T @ hidden.float()
        self.counts[expert] += token_ids.numel()

    def finish(self) -> None:
        """Nothing is left to do."""

    def means(self, expert: int) -> tuple[Tensor, Tensor]:
        """The mean of ``x xᵀ`` for the two matrices; the layer's for an expert no token reached."""
        if self.counts[expert]:
            return self.up[expert] / self.counts[expert], self.down[expert] / self.counts[expert]
        total = max(1, self.counts.total())
        return self.up.sum(0) / total, self.down.sum(0) / total


def moments_of(view: CheckpointView, calibration: tuple[HeldOut, ...]) -> dict[int, Moments]:
    """Run the original on the calibration text once, and watch what goes into its experts."""
    streamed = Streamed(view, dtype=DTYPE)
    cursor = Cursor()
    found = {
        layer.name: Moments(layer, math_of(streamed.model.get_submodule(layer.name))) for layer in view.layers
    }
    with attached(streamed.model, found, cursor):
        for part in calibration:
            for rows in streamed.batches(*part.input_ids.shape, max_bytes=DEFAULT_WORKING_BYTES):
                valid = part.attention_mask[rows].bool().reshape(-1)
                cursor.move(valid, torch.zeros(valid.shape, dtype=torch.int64))
                streamed.hidden(part.input_ids[rows], part.attention_mask[rows])
    return {one.layer.index: one for one in found.values()}


class Bench:
    """The original's states on held-out text, and what calibration text says of its experts' inputs."""

    def __init__(self, view: CheckpointView, texts: Texts, seed: int) -> None:
        self._view, self._held_out, self._seed = view, texts.held_out, seed
        self._layers = {layer.index: layer for layer in view.layers}
        self._moments = moments_of(view, texts.calibration)
        original = Streamed(view, dtype=DTYPE)
        self._states = [original.hidden(part.input_ids, part.attention_mask) for part in texts.held_out]

    def measure(self, contender: Contender) -> dict[str, Any]:
        """One row of the results."""
        started = time.perf_counter()
        experts = {
            (layer.index, number): self._stored(contender, layer, number)
            for layer in self._view.layers
            for number in range(layer.num_experts)
        }
        seconds = time.perf_counter() - started
        streamed = Streamed(self._view, lambda layer, number, _: experts[layer, number].tensors, dtype=DTYPE)
        scored = [
            (self._scores(streamed, part, states), part)
            for part, states in zip(self._held_out, self._states, strict=True)
        ]
        quality = summarise(scored, 0.0, self._seed)
        weights = sum(one.num_weights for one in experts.values())
        lost = [one.lost for one in experts.values()]
        return {
            "name": contender.name,
            "by": contender.by,
            "calibrated": contender.calibrated,
            "bits_per_weight": round(sum(one.bits for one in experts.values()) / weights, 4),
            "kl": float(f"{quality.kl:.4g}"),
            "kl_low": float(f"{quality.kl_low:.4g}"),
            "kl_high": float(f"{quality.kl_high:.4g}"),
            "equal_top": round(quality.equal_top, 5),
            "perplexity": round(quality.perplexity["all"], 4),
            "output_error": float(f"{np.mean(lost):.4g}"),
            "encode_seconds": round(seconds, 1),
        }

    def _stored(self, contender: Contender, layer: LayerView, number: int) -> Stored:
        """One expert as it is read back, and what that takes and loses."""
        tensors = layer.native_expert(number)
        made, bits, num_weights, lost = [], 0.0, 0, []
        for matrix, moments in zip(
            (tensors.up, tensors.down), self._moments[layer.index].means(number), strict=True
        ):
            weight = (matrix.mT if layer.layout.transposed else matrix).float()
            found = contender.rounded(weight, moments)
            lost.append(relative_error(weight, found, moments))
            bits += contender.bits(*weight.shape) * weight.numel()
            num_weights += weight.numel()
            made.append(found.mT if layer.layout.transposed else found)
        return Stored(tensors._replace(up=made[0], down=made[1]), bits, num_weights, float(np.mean(lost)))

    def _scores(self, streamed: Streamed, part: HeldOut, states: Tensor) -> Scores:
        targets = part.input_ids.roll(-1, 1).reshape(-1)
        chunks: list[Scores] = []

        def on_both(logits: Tensor, reference: Tensor, positions: Tensor) -> None:
            chunks.append(score_chunk(reference, logits, targets[positions]))

        streamed.run_beside(
            part.input_ids, part.attention_mask, beside=states, on_both=on_both, wanted=part.predicted
        )
        return join(chunks)


@dataclass(frozen=True, slots=True)
class Stored:
    """An expert read back, the bits it takes, its weights, and its matrices' mean error in outputs."""

    tensors: ExpertTensors
    bits: float
    num_weights: int
    lost: float


def relative_error(weight: Tensor, found: Tensor, moments: Tensor) -> float:
    """Squared error of the products with the calibration inputs, as a share of the products' squares."""
    wrong = found - weight
    return float(((wrong @ moments) * wrong).sum() / ((weight @ moments) * weight).sum())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, widest first."""
    lines = ["| by | type | calibrated | bits | KL | 95 % | equal top | output error |", "|" + "---|" * 8]
    lines += [
        f"| {one['by']} | {one['name']} | {'yes' if one['calibrated'] else 'no'} "
        f"| {one['bits_per_weight']:.3f} | {one['kl']:.4g} | {one['kl_low']:.4g} to {one['kl_high']:.4g} "
        f"| {one['equal_top']:.2%} | {one['output_error']:.3g} |"
        for one in sorted(rows, key=lambda one: (-one["bits_per_weight"], one["kl"]))
    ]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mixtura": mixtura.__version__,
    }
    for name in ("llama-cpp-python", "hqq"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def keep(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the rows beside those that are there already; returns all."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"results": [], "versions": {}}
    new = {(one["name"], one["calibrated"]) for one in rows}
    every = [one for one in known["results"] if (one["name"], one["calibrated"]) not in new] + rows
    record = {
        "benchmark": "quality",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine(),
        "versions": known["versions"] | versions(),
        **about,
        "results": every,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return every


def main() -> None:
    """Measure, keep after every row, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint; without it, the specimen")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose names begin so")
    parser.add_argument("--ggml", type=Path, default=None, help="libggml-base, where it is no package's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.model or specimen.path()
    view = open_checkpoint(path)
    texts = load_texts(
        None,
        load_tokenizer(path),
        length=LENGTH,
        calibration_tokens=CALIBRATION_TOKENS,
        held_out_tokens=HELD_OUT_TOKENS,
        seed=args.seed,
    )
    about = {
        "model": "specimen" if args.model is None else args.model.name,
        "seed": args.seed,
        "dtype": str(DTYPE).removeprefix("torch."),
        "calibration_tokens": sum(int(part.attention_mask.sum()) for part in texts.calibration),
        "held_out_tokens": sum(int(part.attention_mask.sum()) for part in texts.held_out),
        "load_average": round(os.getloadavg()[0], 2),
    }
    bench = Bench(view, texts, args.seed)
    every: list[dict[str, Any]] = []
    for contender in contenders(args.ggml):
        if contender.name.startswith(tuple(args.rows)):
            row = bench.measure(contender)
            print(json.dumps(row), file=sys.stderr, flush=True)
            every = keep(args.out, [row], about)
    print(table(every))


if __name__ == "__main__":
    main()
