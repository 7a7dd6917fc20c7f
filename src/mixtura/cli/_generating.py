"""What `mixtura generate` may be given, and the model that it then runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from mixtura.cli._tiers import wish_of
from mixtura.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bits = Annotated[
    int | None,
    typer.Option(help="Read experts that were stored with the quantizer nested at 8, 4 or 2 bits."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory the whole process may take, such as 8GiB; experts beyond it are read from disk."
    ),
]
Cache = Annotated[str, typer.Option(help="With --memory: which experts stay (mixtura methods caches).")]
Prefetch = Annotated[str, typer.Option(help="With --memory: which are read ahead; see mixtura methods.")]
TraceFile = Annotated[Path | None, typer.Option(help="With --memory: a trace (mixtura observe) to go by.")]
Adapter = Annotated[
    Path | None, typer.Option(help="The directory of an adapter, such as `mixtura tune` writes.")
]
Unmerged = Annotated[
    bool,
    typer.Option(
        "--unmerged", help="Run the adapter beside the weights instead of merging it in memory first."
    ),
]
DecoderNames = Annotated[
    str,
    typer.Option(
        help="Generate by this decoder, or several with commas; `mixtura methods decoders` lists them."
    ),
]
Changes = Annotated[list[str], typer.Option("--set", help="A setting of the decoder, such as beta=0.5.")]
VerifierFile = Annotated[
    Path | None,
    typer.Option(
        help="A .py file whose verify(prompt, texts) scores texts, for decoders that choose by one."
    ),
]
Calibration = Annotated[Path | None, typer.Option(help="A file that `mixtura calibrate` made.")]
ModelToo = Annotated[list[str], typer.Option(help="A further model, for decoders that run several.")]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How a model is to be loaded.

    ``text``, ``chat`` and ``max_new_tokens`` say what the cache must hold under a budget of memory.
    """

    bits: int | None
    memory: str | None
    cache: str
    prefetch: str
    trace: Path | None
    adapter: Path | None
    merge: bool
    text: str
    chat: bool
    max_new_tokens: int

    def check(self) -> None:
        """Refuse what does not go together, before anything heavy is imported.

        Raises:
            SettingError: an adapter is to run on experts that are on disk in part.
        """
        if self.adapter is not None and self.memory is not None:
            raise SettingError(
                "--adapter changes weights that --memory leaves on disk; write the model with the adapter "
                "in it by `mixtura merge`, and give that"
            )


def loaded(model: str | None, wanted: Wanted, *, yes: bool) -> tuple[PreTrainedModel, Any, str]:
    """The model, its tokenizer and its name."""
    # Before PyTorch is imported, and the tokenizer before the model: both keep the process small.
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    _check_model(resolved.path)
    if wanted.adapter is not None:
        from mixtura.running.adapters import adapter_config

        adapter_config(wanted.adapter)
    tokenizer = load_tokenizer(resolved.path)
    from mixtura.running.loading import load

    context = _num_tokens(tokenizer, wanted) + wanted.max_new_tokens if wanted.memory else 1
    wish = wish_of(wanted.memory, wanted.cache, wanted.prefetch, wanted.trace, context)
    found: Any = load(resolved.path, bits=wanted.bits, memory=wish)
    if wanted.adapter is not None:
        from mixtura.running.adapters import ready_to_run

        found = ready_to_run(found, wanted.adapter, merge=wanted.merge)
    return found, tokenizer, resolved.name


def _num_tokens(tokenizer: Any, wanted: Wanted) -> int:
    """Tokens of the prompt, which decide what the cache takes."""
    from mixtura.running.generation import encode_prompt

    return encode_prompt(tokenizer, wanted.text, chat=wanted.chat).shape[0]


def _check_model(path: Path) -> None:
    """Refuse what is no model before its tokenizer is looked for.

    Raises:
        CheckpointError: it is a file, or has no config.json.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a model: it has no config.json; give the directory of a transformers model"
        )
