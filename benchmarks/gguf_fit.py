"""Measure what a byte buys in llama.cpp: `mixtura fit --format gguf` beside llama.cpp's own mixtures.

For shares of the weights' bytes, a model (the specimen, or --model) is fitted to a GGUF file of that
size, and to mixtura's own format at the same bytes. Beside them stand the mixtures that llama.cpp's
``llama_model_quantize`` makes (Q2_K to Q6_K and the IQ ones) with an importance matrix from the same
calibration text. All are judged alike: values as they are decoded, computed in float32, KL divergence to the
original in nats a token, on held-out text that no plan was chosen by.

    python benchmarks/gguf_fit.py                          # half an hour on a quiet machine
    python benchmarks/gguf_fit.py --rows llama.cpp         # only some rows

It needs ``pip install 'mixtura[llama]'``. Rows measured anew take the place of those kept.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer import machine
from quality import versions
from torch import Tensor

from mixtura import specimen
from mixtura.checkpoints.gguf.libraries import llama_library
from mixtura.checkpoints.gguf.tensors import FileTensor
from mixtura.checkpoints.gguf.types import storage_type
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.fitting import Request, fit
from mixtura.fitting.forms.gguf.form import GgufForm
from mixtura.fitting.forms.gguf.stream import changed_stream
from mixtura.fitting.forms.known import form_of
from mixtura.fitting.quality import HeldOut, summarise
from mixtura.fitting.scoring import scores_beside
from mixtura.fitting.texts import as_batch, load_texts
from mixtura.running.gguf import export_gguf
from mixtura.running.observing.importance import inputs_of
from mixtura.running.stream import Streamed

RESULTS = Path(__file__).parent / "results" / "gguf_fit.json"
SHARES = (0.25, 0.33, 0.5)
MIXTURES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S",
    "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K",
    "Q8_0",
)  # fmt: skip
LENGTH, TOKENS = 512, 8192
DTYPE = torch.float32


class Bench:
    """The original's states on held-out text that no fit sees, and how any variant of it is scored."""

    def __init__(self, path: Path, place: Path, seed: int, seconds: float) -> None:
        self.view: CheckpointView = open_checkpoint(path)
        self.path, self.place, self.seed, self.seconds = path, place, seed, seconds
        self.parts = _unseen(path, seed)
        original = Streamed(self.view, dtype=DTYPE)
        self.states = [original.hidden(part.input_ids, part.attention_mask) for part in self.parts]

    def row(self, name: str, num_bytes: int, streamed: Streamed, **more: Any) -> dict[str, Any]:
        """One row of the results."""
        scored = [
            (scores_beside(streamed, part, states), part)
            for part, states in zip(self.parts, self.states, strict=True)
        ]
        quality = summarise(scored, 0.0, self.seed)
        return {
            "name": name,
            "weights_bytes": num_bytes,
            "share": round(num_bytes / self.view.num_bytes, 4),
            "kl": float(f"{quality.kl:.4g}"),
            "kl_low": float(f"{quality.kl_low:.4g}"),
            "kl_high": float(f"{quality.kl_high:.4g}"),
            "equal_top": round(quality.equal_top, 5),
            "perplexity": round(quality.perplexity["all"], 4),
            "load_average": round(os.getloadavg()[0], 2),
            **more,
        }

    def fitted(self, form: str, num_bytes: int) -> dict[str, Any]:
        """A fit to so many bytes of weights."""
        out = self.place / f"{form}-{num_bytes}"
        request = Request(
            model=self.path,
            out=out,
            name="model",
            form=form,
            time_s=self.seconds,
            seed=self.seed,
            work=self.place / f"{form}.work",
        )
        account = form_of(request, self.view).allowance().account
        room = account.total_bytes - account.weights_bytes + num_bytes
        started = time.monotonic()
        made = fit(replace(request, model_memory_bytes=room), _told, keep_work=True)
        more = {
            "seconds": round(time.monotonic() - started),
            "measured": len(made.tried),
            "left_out": list(made.left_out),
            "kl_that_decided": made.after.quality.kl,
        }
        if form == "mixtura":
            return self.row(
                form,
                made.after.weights_bytes,
                Streamed(open_checkpoint(out), dtype=DTYPE),
                asked=num_bytes,
                **more,
            )
        file = next(out.glob("*.gguf"))
        return self.row(form, file.stat().st_size, self.streamed(file), asked=num_bytes, **more)

    def streamed(self, file: Path) -> Streamed:
        """What a file's values make of the model."""
        from gguf import GGUFReader

        library = llama_library()
        assert library is not None
        found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        form = GgufForm(Request(model=self.path, out=file.parent, form="gguf"), self.view)

        def decoded(tensor: FileTensor, number: int) -> Tensor:
            there = found[tensor.name]
            kind = storage_type(there.tensor_type.name)
            data = np.ascontiguousarray(there.data).view(np.uint8).reshape(len(tensor.pieces), -1)[number]
            codes = torch.from_numpy(data.copy())
            shape = tensor.shape[-2:] if len(tensor.pieces) > 1 else tensor.shape
            rows = codes.numel() // kind.num_bytes(shape[-1:])
            return library.decode(codes, kind, rows, shape[-1]).reshape(shape)

        units = [(unit, unit.tensors) for unit in form.units]
        return changed_stream(self.view, units, decoded, DTYPE)

    def mixtures(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What llama.cpp's own quantizing makes, with importance from the calibration text of a fit."""
        import llama_cpp

        whole = self.place / "whole.gguf"
        if not whole.exists():
            export_gguf(self.path, whole, ["f32"])
        held = _importance(GgufForm(Request(model=self.path, out=whole, form="gguf"), self.view), self.seed)
        for name in names:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
            params.imatrix = held.entries
            file = self.place / f"{name}.gguf"
            if llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), ctypes.byref(params)):
                print(f"llama.cpp did not make {name}", file=sys.stderr)
                continue
            yield self.row(f"llama.cpp {name}", file.stat().st_size, self.streamed(file))
            file.unlink()


class _Held:
    """An importance matrix as llama.cpp takes it, and the memory it points to."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        import llama_cpp

        self.values = {name: value.contiguous() for name, value in tensors.items()}
        kind = llama_cpp.llama_model_imatrix_data
        self.entries = (kind * (len(tensors) + 1))(
            *(
                kind(
                    name.encode(),
                    ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_float)),
                    value.numel(),
                )
                for name, value in self.values.items()
            )
        )


def _importance(form: GgufForm, seed: int) -> _Held:
    """By llama.cpp's names, of the calibration text that fits have; experts one after the other."""
    tokenizer = load_tokenizer(form.view.path)
    texts = load_texts(
        None, tokenizer, length=LENGTH, calibration_tokens=TOKENS, held_out_tokens=TOKENS, seed=seed
    )
    squares = inputs_of(Streamed(form.view, dtype=DTYPE), as_batch(texts.calibration)).squares
    found = {}
    for unit in form.units:
        for tensor in unit.tensors:
            names = [piece.inputs for piece in tensor.pieces]
            if all(name in squares for name in names):
                found[tensor.name] = torch.cat([squares[str(name)].float() for name in names])
    return _Held(found)


def _unseen(path: Path, seed: int) -> tuple[HeldOut, ...]:
    """Held-out text without what fits are judged by."""
    tokenizer = load_tokenizer(path)

    def texts(tokens: int) -> tuple[HeldOut, ...]:
        return load_texts(
            None, tokenizer, length=LENGTH, calibration_tokens=TOKENS, held_out_tokens=tokens, seed=seed
        ).held_out

    seen = {tuple(ids[mask.bool()].tolist()) for part in texts(TOKENS) for ids, mask in _rows(part)}
    left = []
    for part in texts(4 * TOKENS):
        rows = [
            n for n, (ids, mask) in enumerate(_rows(part)) if tuple(ids[mask.bool()].tolist()) not in seen
        ]
        if rows:
            fields = ("input_ids", "attention_mask", "domains", "answers")
            cut = {name: getattr(part, name)[rows] for name in fields}
            left.append(replace(part, groups=tuple(part.groups[n] for n in rows), **cut))
    return tuple(left)


def _rows(part: HeldOut) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(part.input_ids, part.attention_mask, strict=True)


def _told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rows(
    bench: Bench, wanted: tuple[str, ...], shares: Sequence[float], mixtures: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """All rows whose names begin as wanted."""
    for form in ("gguf", "mixtura"):
        for share in shares if form.startswith(wanted) else ():
            yield bench.fitted(form, int(share * bench.view.num_bytes))
    if "llama.cpp".startswith(wanted):
        yield from bench.mixtures(mixtures)


def keep(out: Path, row: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a row beside those that are there already; returns all."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"results": []}
    key = ("name", "asked")
    others = [one for one in known["results"] if any(one.get(k) != row.get(k) for k in key)]
    every = sorted([*others, row], key=lambda one: (one["weights_bytes"], one["name"]))
    record = {
        "benchmark": "gguf_fit",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine(),
        "versions": versions(),
        **about,
        "results": every,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return every


def table(every: list[dict[str, Any]]) -> str:
    """Markdown, smallest first."""
    lines = ["| | share of the weights | KL | 95 % | equal top |", "|" + "---|" * 5]
    lines += [
        f"| {one['name']} | {one['share']:.1%} | {one['kl']:.4g} "
        f"| {one['kl_low']:.4g} to {one['kl_high']:.4g} | {one['equal_top']:.2%} |"
        for one in every
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, keep after every row, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint; without it, the specimen")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose names begin so")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=SHARES, help="of the weights' bytes, for fits"
    )
    parser.add_argument("--mixtures", nargs="+", default=MIXTURES, help="llama.cpp's, by name")
    parser.add_argument("--minutes", type=float, default=30, help="--time of each fit")
    parser.add_argument("--place", type=Path, default=None, help="for files; kept, so that work goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    place = args.place or Path(tempfile.mkdtemp())
    bench = Bench(args.model or specimen.path(), place, args.seed, 60 * args.minutes)
    about = {
        "model": "specimen" if args.model is None else args.model.name,
        "seed": args.seed,
        "minutes": args.minutes,
        "tokens": sum(int(part.predicted.sum()) for part in bench.parts),
    }
    every: list[dict[str, Any]] = []
    for row in rows(bench, tuple(args.rows), args.shares, args.mixtures):
        print(json.dumps(row), file=sys.stderr, flush=True)
        every = keep(args.out, row, about)
    print(table(every))


if __name__ == "__main__":
    main()
