"""Calibrating a decoder: what it learns of a model before it decodes with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mixtura.data.reading import read
from mixtura.data.tasks import TASKS, sample
from mixtura.data.text import calibration
from mixtura.data.tokens import encode_text, num_embeddings_of
from mixtura.errors import UserError
from mixtura.methods.decoders import Calibration, Decoder, Sample
from mixtura.running.decoders.bundle import Cost
from mixtura.running.decoders.composing import name_of, tags_of
from mixtura.running.decoders.entry import prepared
from mixtura.running.decoders.probing import ModelProbe


def calibrate_on(
    model: PreTrainedModel,
    decoder: Decoder,
    samples: Sequence[tuple[str, str, str]],
    *,
    tokenizer: Any,
) -> Calibration:
    """What a decoder learns of a model from questions, their answers and labels.

    Args:
        model: that it is for.
        decoder: with its settings.
        samples: question, answer and label of each; the question may be empty, and so may the label.
        tokenizer: the model's.

    Raises:
        UserError: the decoder needs no calibration, or the samples do not suit it.
    """
    if "needs:calibration" not in tags_of([decoder]):
        raise UserError(f"{type(decoder).__name__} needs no calibration; decode with it as it is")
    if not samples:
        raise UserError("there are no texts to calibrate on; give some")
    embeddings = num_embeddings_of(model.config)
    encoded = []
    for question, answer, label in samples:
        asked = encode_text(question, tokenizer, embeddings) if question else []
        said = encode_text(answer, tokenizer, embeddings, begin=not question)
        if asked or said:
            encoded.append(Sample(token_ids=tuple(asked + said), answer_from=len(asked), label=label))
    with prepared(model, [decoder]) as runners:
        runner = runners[0]
        probe = ModelProbe(runner.model, runner.facts, runner.steerer, Cost())
        values, tensors = decoder.calibrate(probe, encoded, runner.facts)
        method = name_of(decoder)
        return Calibration(method=method, mark=runner.facts.mark, values=values, tensors=tensors)


def samples_of(text: Path | None, tokenizer: Any, num_texts: int) -> list[tuple[str, str, str]]:
    """Questions, answers and labels: of the user's texts, else of mixtura's own.

    The label of a text is its domain; of tasks of mixtura's own it is ``tasks-`` and the language. A
    continuous text has no question.
    """
    if text is not None:
        documents = read(text, tokenizer)[:num_texts]
        return [(one.prompt or "", one.answer or one.text, one.domain) for one in documents]
    asked = max(1, num_texts * 2 // 3 // len(TASKS))
    found = [
        (task.prompt, task.completion, f"tasks-{task.language}") for task in sample("calibration", asked)
    ]
    more = calibration(num_chars=4000 * num_texts, domains=("prose",))
    found += [("", one.text[:1500], one.domain) for one in more[: max(1, num_texts - len(found))]]
    return found
