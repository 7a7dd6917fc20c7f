"""Loading what was written and generating from it, in a process of its own, and answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from transformers import PreTrainedModel

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.fitting.journal import Journal
from mixtura.fitting.result import Sample
from mixtura.fitting.texts import Texts
from mixtura.report.units import format_bytes
from mixtura.running.generation import generate
from mixtura.running.loading import load
from mixtura.running.memory import account, measure_generating
from mixtura.running.memory.available import available_bytes
from mixtura.running.memory.process import release

_MEASURED_TOKENS = 32
_NUM_SAMPLES = 3
SAMPLE_TOKENS = 64
_PROMPT_TOKENS = 48


@final
@dataclass(frozen=True, slots=True)
class Verified:
    """What a generating process of a model was measured to take; `None` where it was not run."""

    weights_bytes: int | None
    accounted_bytes: int | None
    peak_bytes: int | None
    tokens_per_second: float | None
    note: str = ""


def verify(
    directory: Path,
    context: int,
    journal: Journal,
    name: str,
    notify: Callable[[str], None],
    *,
    key: str,
    needed_bytes: int = 0,
) -> Verified:
    """Generate with a model in a process of its own and measure its memory and speed.

    The journal keeps what was measured under `key`.

    A model of which `needed_bytes` are known is run only if there is room for it; the note says why not.
    """
    noted = journal.notes().get(key)
    if noted is not None:
        return Verified(**noted)
    # Where memory is limited, two processes are to share it.
    release()
    free = available_bytes()
    if needed_bytes > free:
        note = f"not run: it needs {format_bytes(needed_bytes)} and {format_bytes(free)} are free"
        return Verified(None, None, None, None, note)
    notify(f"generating with the {name} model")
    taken = account(open_checkpoint(directory), context)
    measured = measure_generating(directory, context, _MEASURED_TOKENS)
    verified = Verified(
        taken.weights_bytes, taken.total_bytes, measured.peak_bytes, measured.tokens_per_second
    )
    journal.note(key, asdict(verified))
    return verified


def sample_answers(
    view: CheckpointView,
    tokenizer: Any,
    answers: Callable[[Sequence[str]], list[str]],
    texts: Texts,
    context: int,
    needed_bytes: int,
) -> tuple[Sample, ...]:
    """What the original and the new model write after a few held-out prompts.

    The original's side is empty where it does not fit this machine's memory.

    Args:
        view: the original.
        tokenizer: of both.
        answers: asks the new model.
        texts: where prompts are taken from.
        context: tokens of prompt and answer at most.
        needed_bytes: what a process with the original takes.
    """
    # Decoded and encoded again, a prompt can become longer than it was.
    prompts = [p for p in _prompts(tokenizer, texts) if len(tokenizer(p)["input_ids"]) < context]
    after = answers(prompts)
    if needed_bytes > available_bytes():
        before = ["(the original does not fit this machine's memory)"] * len(prompts)
    else:
        before = continued(view.path, tokenizer, prompts, context)
    return tuple(Sample(*three) for three in zip(prompts, before, after, strict=True))


def _prompts(tokenizer: Any, texts: Texts) -> list[str]:
    """Questions first, each of another kind; beginnings of other text where there are none."""
    prompts: list[str] = []
    for part in reversed(texts.held_out):
        seen: set[str] = set()
        for row in range(len(part.groups)):
            kind = part.groups[row] or part.domain_names[part.domains[row]]
            answer = part.answers[row].nonzero()
            end = int(answer[0]) if len(answer) else _PROMPT_TOKENS
            if kind not in seen and len(prompts) < _NUM_SAMPLES * 2:
                seen.add(kind)
                prompts.append(tokenizer.decode(part.input_ids[row, :end], skip_special_tokens=True))
    return prompts


def continued(directory: Path, tokenizer: Any, prompts: Sequence[str], context: int) -> list[str]:
    """What a model of transformers writes after each of some prompts, greedily."""
    model = load(directory)
    answers = []
    for prompt in prompts:
        room = context - len(tokenizer(prompt)["input_ids"])
        most = max(1, min(SAMPLE_TOKENS, room))
        made = generate(model, tokenizer, prompt, max_new_tokens=most)
        # An answer that was not ended by the model is cut, and says so.
        is_cut = len(made.token_ids) == most and made.token_ids[-1] not in _ends(model)
        answers.append(made.text + (" …" if is_cut else ""))
    return answers


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens by which a model ends its text."""
    own = model.generation_config
    ends = None if own is None else own.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
