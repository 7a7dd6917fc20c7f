"""A checkpoint written as a GGUF file for llama.cpp, its matrices rounded as calibration text says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import final

from mixtura.checkpoints.gguf.libraries import llama_library
from mixtura.checkpoints.gguf.tensors import Importance
from mixtura.checkpoints.gguf.types import TypeRules
from mixtura.checkpoints.gguf.write import Advance, GgufFile, check_out, encoding, plan_file, write_file
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.running.observing.checkpoint import read_text
from mixtura.running.observing.importance import input_squares

CALIBRATION_TOKENS, _LENGTH = 65_536, 512


@final
class GgufExport:
    """A checkpoint that is to be written as a GGUF file. Making one checks everything and writes nothing.

    Args:
        source: the checkpoint directory.
        types: rules such as ``q4_k`` or ``experts=iq3_s``; see `mixtura.checkpoints.gguf.types.TypeRules`.
            Without any, tensors keep the dtype they have.
        name: what the file calls the model; by default the directory's name.
        calibrate: weigh errors by what calibration text says of each matrix's inputs.

    Raises:
        CheckpointError: the directory is missing, incomplete or damaged.
        UnsupportedModelError: llama.cpp does not know the family, a setting, a tensor or the tokenizer.
        UserError: a type cannot be written, or a rule is for nothing.
    """

    def __init__(
        self,
        source: str | Path,
        types: Iterable[str] = (),
        *,
        name: str | None = None,
        calibrate: bool = True,
    ) -> None:
        self.view: CheckpointView = open_checkpoint(source)
        library = llama_library()
        calibrated = calibrate and library is not None
        self.planned: GgufFile = plan_file(
            self.view, name or Path(source).resolve().name, TypeRules(types), calibrated=calibrated
        )
        self.calibrates = calibrated and any(tensor.is_rounded for tensor in self.planned.tensors)
        self.by_library = library is not None

    def importance(
        self,
        text: Path | None = None,
        *,
        tokens: int = CALIBRATION_TOKENS,
        seed: int = 0,
        report: Callable[[int, int], None] | None = None,
    ) -> Importance:
        """What calibration text says of the matrices' inputs: a user's, or the text that comes with mixtura.

        Raises:
            UserError: the text is missing, empty, too short or not text.
        """
        batch = read_text(self.view, text, max_tokens=tokens, max_length=_LENGTH, seed=seed)
        return input_squares(self.view, batch, report)

    def write(self, out: Path, importance: Importance | None = None, advance: Advance | None = None) -> None:
        """Write the file.

        Raises:
            OutputError: it exists, or cannot be written.
            CheckpointError: a tensor that is read is damaged.
        """
        write_file(self.planned, out, encoding(importance or {}), advance or (lambda num_bytes: None))


def export_gguf(
    source: str | Path,
    out: str | Path,
    types: Iterable[str] = (),
    *,
    text: Path | None = None,
    calibrate: bool = True,
) -> GgufFile:
    """Write a checkpoint as a GGUF file, which llama.cpp runs.

    Args:
        source: the checkpoint directory, of a family in `mixtura.checkpoints.gguf.families.FAMILIES`.
        out: the new file.
        types: rules such as ``q4_k`` or ``experts=iq3_s``; without any, tensors keep their dtype.
        text: text to calibrate on; by default the text that comes with mixtura.
        calibrate: weigh errors by what that text says of each matrix's inputs, as llama.cpp's library can.

    Returns:
        What was written.

    Raises:
        UserError: it cannot be written; the sentence says why and what to do.
    """
    target = Path(out)
    check_out(target)
    export = GgufExport(source, types, calibrate=calibrate)
    export.write(target, export.importance(text) if export.calibrates else None)
    return export.planned
