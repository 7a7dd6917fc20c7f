"""Experts in compressed-tensors' integers: what a compression made, handed over, and models rounded to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import mixtura
from mixtura.checkpoints.applying.staging import check_place
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.pack_quantized.scheme import QUANTIZER, Scheme, stored_scheme
from mixtura.checkpoints.pack_quantized.write import (
    Planned,
    codes_in,
    codes_of,
    plan_checkpoint,
    write_checkpoint,
)
from mixtura.checkpoints.packed import MATRICES, MatrixName
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.errors import SettingError
from mixtura.fitting.compressing.checking import Methods, check_text
from mixtura.fitting.compressing.measuring import Measure
from mixtura.fitting.compressing.passing import rounded
from mixtura.fitting.compressing.reading import read_texts
from mixtura.fitting.compressing.records import DEFAULT_TOKENS, Choices
from mixtura.fitting.compressing.rounding import Shrunk
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.publishing import beside, note_result, noted_result, put_in_place
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Quality
from mixtura.fitting.texts import Texts, as_batch
from mixtura.kernels import ExpertTensors
from mixtura.methods import create
from mixtura.methods.quantizers.integers import Integers
from mixtura.report import counted, human_number
from mixtura.running.observing.passing import packed
from mixtura.running.stream import Streamed
from mixtura.types import Plan

Notify = Callable[[str], None]
_HANDED, _RESULT = "handed", "exported.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A model that was written for others to read.

    Attributes:
        out: where it is.
        bits: of a weight of its routed experts.
        group_size: neighbouring weights that share a scale; 0 for a row.
        bytes_before: of all tensors of what it was made from.
        bytes_after: of all its tensors.
        quality: loss to what it was made from, where experts were rounded and it was measured.
        notes: what else there is to know.
    """

    out: Path
    bits: int
    group_size: int
    bytes_before: int
    bytes_after: int
    quality: Quality | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        return {**asdict(self), "out": str(self.out)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Handed:
        """Read what `to_dict` wrote, also after it was JSON text."""
        quality = None if values["quality"] is None else Quality(**values["quality"])
        out, notes = Path(values["out"]), tuple(values["notes"])
        return Handed(**{**values, "out": out, "notes": notes, "quality": quality})


def scheme_asked(choices: Choices, methods: Methods) -> Scheme:
    """How a compression is to store experts.

    Raises:
        SettingError: its quantizer makes other codes, or there is none.
    """
    if not isinstance(methods.quantizer, Integers):
        named = choices.quantize
        said = "nothing is rounded" if named is None else f"--quantize {named} makes others"
        raise SettingError(
            f"--format compressed-tensors stores experts as symmetric integers, and {said}; give "
            f"--quantize {QUANTIZER} --bits 4, or leave --format out"
        )
    return Scheme(methods.quantizer.bits, methods.quantizer.group_size)


def check_handed(choices: Choices, methods: Methods, view: CheckpointView) -> None:
    """Refuse, before hours of work, what the format has no way to say.

    Raises:
        UserError: says what that is.
    """
    plan_checkpoint(view, scheme_asked(choices, methods), _no_codes)


def _no_codes(layer: int, expert: int, matrix: MatrixName) -> Mapping[str, Tensor]:
    raise AssertionError("nothing is written of what is only checked")


def hand_over(source: Path, out: Path, *, name: str, source_name: str, quality: Quality | None) -> int:
    """Write a checkpoint of the mixtura format as one that transformers reads; bytes of its tensors."""
    view = open_checkpoint(source)
    planned = plan_checkpoint(view, stored_scheme(view), codes_in(view))
    # Written before, where the work was stopped right after: a directory is there whole or not at all.
    if not out.is_dir():
        told = "" if quality is None else _told(quality)
        write_checkpoint(planned, out, name=name, source_name=source_name, told=told)
    return planned.num_bytes


def export_compressed_tensors(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    group_size: int = 128,
    text: str | os.PathLike[str] | None = None,
    tokens: int = DEFAULT_TOKENS,
    measure: bool = True,
    seed: int = 0,
    name: str = "",
    notify: Notify = lambda _: None,
) -> Handed:
    """Write a model as a compressed-tensors checkpoint, which transformers and vLLM load.

    Without ``bits`` experts must be stored as the format has them already, as ``mixtura compress --quantize
    integers`` does, and nothing is lost. With ``bits`` they are rounded to it, whatever they are stored as,
    by GPTQ's feedback on calibration text, and what that loses is measured on held-out text.

    Args:
        source: a checkpoint directory of either kind.
        out: the new directory.
        bits: of an expert's weight, 2 to 8; vLLM has kernels for 4 and 8.
        group_size: neighbouring weights that share a scale; 0 for a row. vLLM: 32, 64, 128 or 0.
        text: to calibrate on and to measure by; by default text that comes with mixtura.
        tokens: of calibration text at most.
        measure: measure what rounding loses.
        seed: of the choice of text.
        name: what the card calls the source; by default its directory.
        notify: told in a few words what is being done.

    Raises:
        UserError: the format cannot say what the model is; names what it is.
    """
    place, path = Path(out), Path(source)
    names = {"name": place.absolute().name, "source_name": name or path.resolve().name}
    if bits is None:
        view = open_checkpoint(path)
        planned = plan_checkpoint(view, stored_scheme(view), codes_in(view))
        write_checkpoint(planned, place, **names)
        return _handed(planned, place, None)
    scheme = Scheme(bits, group_size)
    create("quantizers", QUANTIZER, **scheme.settings)
    asked = (path, scheme, text, tokens, measure, seed)
    done = noted_result(place, asked, is_there=(place / "config.json").is_file())
    if done is not None:
        return Handed.from_dict(done)
    check_place(place, path)
    view = open_checkpoint(path)
    plan_checkpoint(view, scheme, _no_codes)
    read = read_texts(view, None if text is None else Path(text), tokens=tokens, seed=seed)
    work = _Rounding(view, scheme, read, seed, notify)
    with open_journal(beside(place), work.settings(measure), "rounding", "") as journal:
        made = work.carry_out(journal, place, names, measure=measure)
        note_result(journal, asked, made.to_dict())
        put_in_place(journal.path(_HANDED), place, _RESULT, made.to_dict())
    shutil.rmtree(beside(place))
    return made


@final
@dataclass(frozen=True, slots=True)
class _Rounding:
    """Experts rounded to a scheme on the way out."""

    view: CheckpointView
    scheme: Scheme
    texts: Texts
    seed: int
    notify: Notify

    def settings(self, measure: bool) -> dict[str, Any]:
        """All that decides the bytes of the result."""
        return {
            **self.scheme.settings,
            "model": checkpoint_digest(self.view.path),
            "text": self.texts.digest,
            "measure": measure,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "mixtura": mixtura.__version__,
            "torch": torch.__version__,
        }

    def carry_out(self, journal: Journal, out: Path, names: Mapping[str, str], *, measure: bool) -> Handed:
        """Round, measure, and write in the journal's directory."""
        kept = self.rounded(journal)
        quality = self.measured(kept, journal) if measure else None
        planned = plan_checkpoint(self.view, self.scheme, codes_of(kept, self.scheme))
        if not journal.path(_HANDED).is_dir():
            self.notify(f"writing {out.name}")
            told = "" if quality is None else _told(quality)
            write_checkpoint(planned, journal.path(_HANDED), **names, told=told)
        return _handed(planned, out, quality)

    def rounded(self, journal: Journal) -> RoundedExperts:
        """The experts, each on what the rounded layers before give it."""
        shrunk = Shrunk(Plan(checkpoint_digest(self.view.path)), QUANTIZER, self.scheme.settings)
        tokens = packed(as_batch(self.texts.calibration))
        check_text(self.view, tokens.num_tokens)
        return rounded(self.view, shrunk, tokens, journal, self.notify)

    def measured(self, kept: RoundedExperts, journal: Journal) -> Quality:
        """What they lose beside the source."""
        quantizer = create("quantizers", QUANTIZER, **self.scheme.settings)

        def instead(layer: int, expert: int, dtype: torch.dtype) -> ExpertTensors:
            found = kept.read(self.scheme.action(layer, expert)).encodings
            up, down = (quantizer.decode(found[matrix], dtype) for matrix in MATRICES)
            return ExpertTensors(up, down, None, None)

        measure = Measure(self.texts.held_out, journal, self.seed, self.notify)
        measure.before(self.view)
        return measure.streamed(lambda: Streamed(self.view, instead), "the rounded experts")


def _handed(planned: Planned, out: Path, quality: Quality | None) -> Handed:
    notes = []
    if planned.decoded:
        notes.append(
            f"{counted(len(planned.decoded), 'tensor')} outside the experts that were in fewer bits are "
            f"plain numbers again"
        )
    if not planned.scheme.runs_in_vllm:
        notes.append(
            "transformers reads these experts; vLLM has kernels for 4 and 8 bits with groups of 32, 64 or "
            "128 or rows"
        )
    return Handed(
        out=out,
        bits=planned.scheme.bits,
        group_size=planned.scheme.group_size,
        bytes_before=planned.view.num_bytes,
        bytes_after=planned.num_bytes,
        quality=quality,
        notes=tuple(notes),
    )


def _told(quality: Quality) -> str:
    return (
        f"On {counted(quality.num_tokens, 'token')} of held-out text its KL divergence to what it was made "
        f"from is {human_number(quality.kl)} nats per token, and its perplexity "
        f"{human_number(quality.perplexity[ALL])}."
    )
