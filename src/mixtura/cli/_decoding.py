"""The options of `mixtura generate` that are about decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mixtura.cli._settings import parse_settings
from mixtura.errors import UserError

if TYPE_CHECKING:
    from mixtura.methods.decoders import Decoder, Verifier


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for of a decoder."""

    decoders: tuple[Decoder, ...]
    verifier: Verifier | None
    calibration: Path | None
    models: tuple[str, ...]


def asked_for(
    names: str, changes: list[str], verifier: Path | None, calibration: Path | None, models: list[str]
) -> Asked | None:
    """The decoders by their names, made with their settings before anything is loaded; None for none.

    Raises:
        UserError: options of a decoder are given without one, or settings with several.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        if changes or verifier or calibration or models:
            raise UserError("--set, --verifier, --calibration and --model-too are for a --decoder; name one")
        return None
    if changes and len(wanted) > 1:
        raise UserError("--set is for one decoder; several with settings are combined in Python, by decode")
    from mixtura.methods import create
    from mixtura.running.decoders.entry import require_given
    from mixtura.running.decoders.verifiers import verifier_of

    settings = parse_settings(changes)
    decoders = tuple(create("decoders", name, **settings) for name in wanted)
    verify = None if verifier is None else verifier_of(verifier)
    if calibration is not None and not calibration.is_file():
        raise UserError(f"there is no file {calibration}; make one by 'mixtura calibrate {wanted[0]}'")
    require_given(decoders, verifier=verify, calibrated=calibration is not None, num_more=len(models))
    return Asked(decoders, verify, calibration, tuple(models))


def by_decoder(asked: Asked, *, yes: bool) -> Callable[..., Any]:
    """`mixtura.running.generation.generate`, by decoders instead."""

    def run(model: Any, tokenizer: Any, prompt: str, **options: Any) -> Any:
        from mixtura.running.decoders.entry import decode
        from mixtura.running.loading import load
        from mixtura.running.resolve import resolve_model

        return decode(
            model,
            tokenizer,
            prompt,
            list(asked.decoders),
            verifier=asked.verifier,
            calibration=asked.calibration,
            models=[load(resolve_model(one, assume_yes=yes).path) for one in asked.models],
            **options,
        )

    return run
