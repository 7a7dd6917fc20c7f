"""Generate text with a loaded model: the prompt in chunks, then token by token, within bounded memory.

transformers' own ``generate`` does the work. What is added here is a cache that is allocated once
instead of growing by copies, a prompt read in chunks where the family allows it, and random numbers
that leave the global generator alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from mixtura.data.shapes import word_chat
from mixtura.data.tokens import encode_text, num_embeddings_of
from mixtura.errors import UserError, check_range
from mixtura.kernels.step_cache import RoomyLayer
from mixtura.machine.releases import with_cache
from mixtura.running.decoding import StopStrings, decoding_config

# Tokens of a prompt that run together. Attention that is not fused holds a score for each of them,
# every earlier token and every head.
CHUNK_TOKENS = 256
CHUNK_TOKENS_EAGER = 64

OnText = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What was generated and how long it took.

    ``token_ids`` are the new tokens, an end token included; ``prefill_ms`` is the time to the first
    new token, ``decode_ms`` the time for the others.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    prefill_ms: float
    decode_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first in a second; 0 where there are none."""
        return (len(self.token_ids) - 1) / self.decode_ms * 1000 if self.decode_ms > 0 else 0.0


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: OnText | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model: from `mixtura.load`, or any causal language model of transformers.
        tokenizer: the model's.
        prompt: text to continue, or with ``chat`` a user's message.
        max_new_tokens: tokens to generate at most; an end token of the model stops earlier.
        temperature: 0 takes the likeliest token each time; more draws from the distribution, in the way
            that the model's ``generation_config.json`` says (see `mixtura.running.decoding`).
        seed: of the draws.
        chat: put the prompt through the tokenizer's chat template.
        on_text: called with pieces of the text as they are made.

    Raises:
        SettingError: ``max_new_tokens``, ``temperature`` or ``seed`` is out of range.
        UserError: the prompt has no tokens, too many or such as the model has not, or ``chat`` without a
            chat template that takes it.
    """
    check_range("generate", "max_new_tokens", max_new_tokens, 1, 1 << 30)
    check_range("generate", "temperature", temperature, 0.0, 100.0)
    check_range("generate", "seed", seed, 0, (1 << 63) - 1)
    prompt_ids = encode_prompt(tokenizer, prompt, chat=chat, num_embeddings=num_embeddings_of(model.config))
    check_positions(model, prompt_ids.shape[0], max_new_tokens)
    clock = Clock(tokenizer, on_text)
    new = new_tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streamer=clock,
        stops=StopStrings(model, tokenizer, prompt_ids.shape[0]),
    )
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        token_ids=tuple(new.tolist()),
        num_prompt_tokens=prompt_ids.shape[0],
        prefill_ms=clock.prefill_ms,
        decode_ms=clock.decode_ms,
    )


def check_positions(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a text that may become longer than the model was made for.

    Raises:
        UserError: there are more tokens than positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and num_prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"the prompt's {num_prompt_tokens} tokens and {max_new_tokens} new ones are more than the "
            f"{positions} positions the model was made for; shorten the prompt or generate fewer tokens"
        )


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool = False, num_embeddings: int | None = None
) -> Int[Tensor, " T"]:
    """A prompt's tokens.

    Raises:
        UserError: there are none, the model has no embedding for one, or ``chat`` is asked of a tokenizer
            whose chat template does not take it, or that has none.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this model's tokenizer has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        prompt = word_chat(message, tokenizer, "the prompt", add_generation_prompt=True)
    # What a chat template leaves out its model has not learned to expect.
    ids = encode_text(prompt, tokenizer, num_embeddings, begin=not chat)
    if not ids:
        raise UserError("the prompt is empty; give some text to continue")
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def new_tokens(
    model: PreTrainedModel,
    prompt_ids: Int[Tensor, " T"],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    stops: StopStrings | None = None,
) -> Int[Tensor, " N"]:
    """The tokens that follow a prompt's, by transformers' ``generate`` in bounded memory.

    The memory this takes is what `running.memory.account` accounts for. An end token of the model ends
    them early, and what ``stops`` finds.

    Raises:
        UserError: the model cannot generate, or its configuration says how in a way that cannot be.
    """
    config = decoding_config(
        model, temperature, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None
    )
    cache = reserved_cache(model, prompt_ids.shape[0] + max_new_tokens)
    if cache is not None and prefills_in_chunks(cache):
        config.prefill_chunk_size = chunk_tokens(model)
    with _seeded(seed):
        made: Any = model.generate(
            input_ids=prompt_ids[None],
            attention_mask=torch.ones_like(prompt_ids)[None],
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([] if stops is None else [stops]),
            **with_cache(cache),
        )
    return made[0, prompt_ids.shape[0] :]  # type: ignore[no-any-return]


def tokens_per_second(model: PreTrainedModel, *, context: int = 64, num_tokens: int = 32) -> float:
    """Decoding speed for one sequence: new tokens in a second after a short prompt.

    The prompt is made of token ids spread over the vocabulary, so that many experts take part.
    """
    clock = Clock()
    prompt_ids = spread_ids(model, context)
    new_tokens(
        model, prompt_ids, max_new_tokens=num_tokens + 1, min_new_tokens=num_tokens + 1, streamer=clock
    )
    return clock.tokens_per_second


def spread_ids(model: PreTrainedModel, num_tokens: int) -> Int[Tensor, " T"]:
    """Token ids spread over the vocabulary, always the same."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (num_tokens,), generator=generator)


def chunk_tokens(model: PreTrainedModel) -> int:
    """Tokens of a prompt that run together."""
    eager = model.config.get_text_config()._attn_implementation == "eager"
    return CHUNK_TOKENS_EAGER if eager else CHUNK_TOKENS


def prefills_in_chunks(cache: Cache) -> bool:
    """Whether a prompt can be read in chunks.

    Sparse attention with an indexer picks other tokens for a chunk than for the whole prompt.
    """
    return not any(isinstance(layer, DynamicIndexedLayer) for layer in cache.layers)


def reserved_cache(model: PreTrainedModel, num_tokens: int) -> Cache | None:
    """A cache with room for so many tokens; None for a family that makes a cache of its own."""
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [
        ReservedLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@final
class ReservedLayer(RoomyLayer):
    """Keys and values of one layer in memory that is taken once.

    transformers' own grows by copying everything for every token, which doubles a layer's memory for
    a moment and reads and writes the whole cache for each token.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._room: tuple[Tensor, Tensor] | None = None
        self._returned: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[S, H, T, D]``; returns all there are, as views of the reserved memory."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), key_states.shape[-2]
        keys, values = self._lengthened(key_states, value_states, new)
        for shown, states in ((keys, key_states), (values, value_states)):
            shown[..., old:, :] = states
        return keys, values

    def lengthen(self, num_tokens: int) -> None:
        """Show so many tokens more, whose keys and values the caller writes; there are some already."""
        assert self.keys is not None
        assert self.values is not None
        self._lengthened(self.keys, self.values, num_tokens)

    def _lengthened(self, like_keys: Tensor, like_values: Tensor, new: int) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length() + new
        # Beam search and the like put other tensors in the place of what was returned last.
        if self._room is None or length > self._num_tokens or self.keys is not self._returned:
            self._room = self._reserve(like_keys, like_values, length)
        keys, values = (room[..., :length, :] for room in self._room)
        self.keys, self.values, self._returned = keys, values, keys
        return keys, values

    def _reserve(self, like_keys: Tensor, like_values: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Memory for all tokens, with what there is moved to it."""
        length = self.get_seq_length()
        if needed > self._num_tokens:
            self._num_tokens = 2 * needed
        keys, values = (
            states.new_empty(*states.shape[:2], self._num_tokens, states.shape[-1])
            for states in (like_keys, like_values)
        )
        if self.keys is not None and self.values is not None and length:
            keys[..., :length, :] = self.keys
            values[..., :length, :] = self.values
        return keys, values

    @property
    def num_bytes(self) -> int:
        """Memory that is taken."""
        return 0 if self._room is None else sum(room.nbytes for room in self._room)

    def shorten(self, num_tokens: int) -> None:
        """Forget all tokens but the first so many; the memory stays taken."""
        if self._room is None or num_tokens >= self.get_seq_length():
            return
        self.keys, self.values = (room[..., :num_tokens, :] for room in self._room)
        self._returned = self.keys

    def reset(self) -> None:
        """Forget every token and give the memory back."""
        super().reset()
        self._room = self._returned = None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """transformers draws from the global generator: seed it for the block, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@final
class Clock(BaseStreamer):
    """Notes when the first and the last token come, and passes text on as it is made."""

    def __init__(self, tokenizer: Any = None, on_text: OnText | None = None) -> None:
        self._text = None if on_text is None else _Text(tokenizer, on_text)
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self._text is not None:
            self._text.put(value)
        if self._saw_prompt:
            self._times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        """All tokens have come."""
        if self._text is not None:
            self._text.end()

    @property
    def prefill_ms(self) -> float:
        """Time to the first token."""
        return (self._times[0] - self._start) * 1000 if self._times else 0.0

    @property
    def decode_ms(self) -> float:
        """Time from the first token to the last."""
        return (self._times[-1] - self._times[0]) * 1000 if self._times else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first in a second; 0 where there are none."""
        return (len(self._times) - 1) / self.decode_ms * 1000 if self.decode_ms > 0 else 0.0


@final
class _Text(TextStreamer):
    """transformers' streamer of whole words, with the text going to a function."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece of text on."""
        del stream_end
        if text:
            self._on_text(text)
