"""The tiny model, words and helpers that contracts of decoders are checked with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.authoring.contracts._core import Subject
from mixtura.methods.decoders import Calibration, Decoder, LayerFacts, ModelFacts, Prompt, Ran
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import Decoded, decode
from mixtura.running.decoders.probing import save_calibration
from mixtura.running.generation import generate

_END = 1
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:\n"
NUM_WORDS = 2 + len(_LETTERS)
PROMPTS = ("abcde", "fghijklmnopq", "rs")


@cache
def model(seed: int = 0) -> Any:
    """A tiny random Qwen3-MoE of 4 layers."""
    config = Qwen3MoeConfig(
        vocab_size=NUM_WORDS,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=_END,
        norm_topk_prob=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                # Random models of the usual scale say the same whatever they read.
                parameter.data.normal_(0.0, 0.4)
    return made.eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    vocabulary = {"<pad>": 0, "<end>": _END} | {letter: 2 + place for place, letter in enumerate(_LETTERS)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def verifier(prompt: str, texts: Sequence[str]) -> list[float]:
    """Some score of a text between 0 and 1 that has nothing to do with what the model thinks of it."""
    return [(sum(map(ord, prompt + text)) * 31 % 97) / 97 for text in texts]


def decoded(decoder: Decoder, method: Subject, prompts: Sequence[str], **options: Any) -> list[Decoded]:
    """Decode with all that a method may need."""
    wanted = {"max_new_tokens": 12, **needed_by(method), **options}
    made: list[Decoded] = decode(model(), tokenizer(), list(prompts), decoder, **wanted)
    return made


def needed_by(method: Subject) -> dict[str, Any]:
    """The arguments of `decode` without which a method does not run."""
    tags, wanted = method.header.tags, dict[str, Any]()
    if "needs:verifier" in tags or "may_use:verifier" in tags:
        wanted["verifier"] = verifier
    if "needs:calibration" in tags:
        wanted["calibration"] = _calibration(method)
    if "needs:models" in tags:
        wanted["models"] = [model(1)]
    return wanted


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="mixtura-contract-"))


_made: dict[str, Path] = {}


def _calibration(method: Subject) -> Path:
    name = method.header.name
    if name not in _made:
        made = calibrate_on(model(), method.create(), samples(), tokenizer=tokenizer())
        _made[name] = _folder() / f"{name}.safetensors"
        save_calibration(made, _made[name])
    return _made[name]


@cache
def samples() -> tuple[tuple[str, str, str], ...]:
    """Questions, the model's own answers and labels to calibrate on."""
    generator = torch.Generator().manual_seed(5)

    def word(length: int) -> str:
        return "".join(_LETTERS[int(i)] for i in torch.randint(0, 60, (length,), generator=generator))

    questions = [word(6) for _ in range(8)]
    answers = [generate(model(), tokenizer(), one, max_new_tokens=4).text for one in questions]
    labels = ("one", "other") * 4
    return tuple(zip(questions, answers, labels, strict=True))


@final
class _NoProbe:
    """Stands for a model where none is run."""

    def head(self, hidden: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def run(self, token_ids: Sequence[int], **options: Any) -> Ran:
        raise NotImplementedError


def sample_prompt(text: str = "abcde", calibration: Calibration | None = None) -> Prompt:
    """A prompt of a model of two layers of 8 experts, 2 of them chosen, that is not there."""
    layers = tuple(LayerFacts(index=i, num_experts=8, top_k=2, scoring="softmax") for i in range(2))
    words = tokenizer()
    return Prompt(
        text=text,
        token_ids=tuple(words.encode(text, add_special_tokens=False)),
        facts=ModelFacts(layers=layers, num_layers=2, vocabulary=NUM_WORDS, ends=(_END,), mark="sample"),
        max_new_tokens=16,
        temperature=0.0,
        probe=_NoProbe(),
        encode=lambda said: tuple(words.encode(said, add_special_tokens=False)),
        decode=lambda ids: str(words.decode(list(ids), skip_special_tokens=True)),
        calibration=calibration,
        verify=verifier,
        num_models=2,
    )
