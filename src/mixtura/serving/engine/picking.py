"""Picking a text's next token from its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from mixtura.running.decoding import decoding_config
from mixtura.serving.engine.records import Guide, Likely, Sampling, Token

_HOTTEST: Final = 100


def default_temperature(model: PreTrainedModel) -> float:
    """The temperature where a request gives none: the model's own if its configuration has one, else 1."""
    own: Any = getattr(model, "generation_config", None)
    found = getattr(own, "temperature", None)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= _HOTTEST:
        return 1.0
    return float(found)


def end_ids_of(model: Any) -> frozenset[int]:
    """Tokens that end a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in ids if isinstance(token, int) and token >= 0)


def processors_for(
    model: PreTrainedModel, sampling: Sampling, num_prompt_tokens: int
) -> tuple[float, LogitsProcessorList]:
    """The temperature of a request, and transformers' own processors of logits for it.

    What the model's ``generation_config.json`` says of drawing is heeded as `mixtura generate` heeds it, but
    for guidance by a second pass.

    Raises:
        UserError: an entry of that file is wrong.
    """
    wanted = sampling.temperature
    temperature = default_temperature(model) if wanted is None else wanted
    if temperature == 0:
        return 0.0, LogitsProcessorList()
    more: dict[str, Any] = {} if sampling.top_p is None else {"top_p": sampling.top_p}
    config: Any = decoding_config(model, temperature, guidance_scale=None, **more)
    maker: Any = model
    maker._prepare_special_tokens(config, False, device="cpu")
    found = maker._get_logits_processor(
        generation_config=config, input_ids_seq_length=num_prompt_tokens, device="cpu"
    )
    return temperature, found


@final
class Picker:
    """Picks tokens for one text; its draws are its own, whatever else runs.

    Args:
        model: for what its configuration says of drawing.
        sampling: how to pick.
        prompt: tokens before the answer.
        guide: which tokens may come; None for all.
        num_top: likeliest tokens to report; None for no log-probabilities.

    Raises:
        UserError: the model's configuration has an entry for drawing that is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        prompt: Sequence[int],
        guide: Guide | None = None,
        num_top: int | None = None,
    ) -> None:
        self._sampling = sampling
        self._temperature, self._processors = processors_for(model, sampling, len(prompt))
        self._ids = list(prompt)
        self._counts: Counter[int] = Counter()
        self._guide = guide
        self._num_top = num_top
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def is_over(self) -> bool:
        """Whether the guide lets nothing come any more."""
        return self._guide is not None and self._guide.is_over

    def pick(self, logits: Float[Tensor, " V"]) -> Token:
        """The next token, which everything after depends on."""
        raw = logits.detach().to(device="cpu", dtype=torch.float32)
        scores = self._changed(raw)
        if self._temperature == 0:
            token = int(scores.argmax())
        else:
            ids = torch.tensor([self._ids])
            shaped = self._processors(ids, scores[None].clone())[0]
            token = int(torch.multinomial(shaped.softmax(-1), 1, generator=self._generator))
        self._ids.append(token)
        self._counts[token] += 1
        if self._guide is not None:
            self._guide.take(token)
        return described(raw, token, self._num_top)

    def _changed(self, raw: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        asked = self._sampling
        scores = raw
        if asked.logit_bias:
            scores = scores.clone()
            for token, bias in asked.logit_bias:
                scores[token] += bias
        if self._counts and (asked.presence_penalty or asked.frequency_penalty):
            seen = torch.tensor(list(self._counts))
            often = torch.tensor([float(number) for number in self._counts.values()])
            scores = scores.index_add(0, seen, -(asked.presence_penalty + asked.frequency_penalty * often))
        return scores if self._guide is None else self._guide.restrict(scores)


def described(logits: Float[Tensor, " V"], token: int, num_top: int | None) -> Token:
    """A token with its log-probability, and the likeliest in its place; bare where ``num_top`` is None."""
    if num_top is None:
        return Token(token)
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, logprobs.shape[0]))
    # What a decoder has ruled out is not among the likeliest, and its logarithm is no JSON.
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = tuple(Likely(int(i), float(v)) for i, v in pairs if v > -torch.inf)
    return Token(token, float(logprobs[token]), top)
