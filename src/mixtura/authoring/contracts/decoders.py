"""What every decoder promises."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixtura.authoring.contracts._core import Subject, require, slow
from mixtura.authoring.contracts._decoded import (
    NUM_WORDS,
    PROMPTS,
    decoded,
    model,
    sample_prompt,
    samples,
    tokenizer,
    verifier,
)
from mixtura.errors import UnsupportedModelError
from mixtura.methods import create
from mixtura.methods.decoders import Decoder
from mixtura.running.decoders.entry import decode
from mixtura.running.generation import generate

__all__ = ["sample_prompt", "samples", "tokenizer", "verifier"]


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> list[str]:
    """Prompts of different lengths."""
    del method
    return list(PROMPTS[seed % 2 :])


def use(decoder: Decoder, prompts: list[str]) -> list[tuple[int, ...]]:
    """The tokens it answers with."""
    method = _subject_of(decoder)
    return [one.token_ids for one in decoded(decoder, method, prompts)]


def _subject_of(decoder: Decoder) -> Subject:
    from mixtura.authoring.contracts._core import subject

    path = type(decoder).__module__
    if path.startswith("mixtura.methods."):
        return subject("decoders", path.rpartition(".")[2])
    import sys

    return subject("decoders", str(sys.modules[path].__file__))


def check_neutral_settings_are_plain_decoding(method: Subject) -> None:
    """With its ``neutral`` settings the tokens are those of plain ``generate``, greedy or drawn by a seed."""
    neutral = dict(method.cls.neutral)
    for temperature in method.cls.neutral_at:
        prompt = PROMPTS[0]
        made = decoded(method.create(**neutral), method, [prompt], temperature=temperature, seed=3)[0]
        plain = generate(
            model(), tokenizer(), prompt, max_new_tokens=12, temperature=temperature, seed=3
        ).token_ids
        require(made.token_ids == plain, f"at temperature {temperature}: {made.token_ids}, plain are {plain}")


def check_nothing_is_left_behind(method: Subject) -> None:
    """Afterwards, also after an exception, the model says bit for bit what it said before, without hooks."""
    inside = model()
    before = _state(inside)
    decoded(method.create(), method, [PROMPTS[0]])
    require(_state(inside) == before, "the model is not as it was")

    def broken(piece: str) -> None:
        raise KeyboardInterrupt

    try:
        decoded(method.create(), method, [PROMPTS[0]], on_text=broken)
    except KeyboardInterrupt:
        require(_state(inside) == before, "after an exception the model is not as it was")


def check_prompts_do_not_touch_each_other(method: Subject) -> None:
    """Prompts of different lengths decoded side by side, padded, give what each gives alone."""
    together = decoded(method.create(), method, PROMPTS, seed=1)
    for prompt, one in zip(PROMPTS, together, strict=True):
        alone = decoded(method.create(), method, [prompt], seed=1)[0]
        require(one.token_ids == alone.token_ids, f"{prompt!r}: {one.token_ids}, alone {alone.token_ids}")


def check_length_and_end(method: Subject) -> None:
    """No branch is longer than asked for, and nothing follows an end token."""
    for length in (1, 7):
        for one in decoded(method.create(), method, PROMPTS, max_new_tokens=length):
            for grown in one.branches:
                ids = grown.token_ids
                require(0 < len(ids) <= length, f"{len(ids)} tokens where {length} were asked for")
                require(1 not in ids[:-1], f"tokens follow an end token: {ids}")


def check_seed_decides(method: Subject) -> None:
    """The same seed gives the same branches at a temperature, whatever was drawn before."""
    first, second = (
        [one.branches for one in decoded(method.create(), method, PROMPTS, temperature=1.0, seed=5)]
        for _ in range(2)
    )
    require(first == second, "two runs of one seed differ")


def check_more_room_changes_nothing_before(method: Subject) -> None:
    """A longer limit goes on from the same tokens (where no branches are chosen among)."""
    if method.has("several"):
        return
    short, long = (
        decoded(method.create(), method, [PROMPTS[1]], max_new_tokens=length)[0].token_ids
        for length in (5, 11)
    )
    require(long[: len(short)] == short, f"{short} with a limit of 5, {long} with one of 11")


@slow
def check_dense_models(method: Subject) -> None:
    """A decoder that steers refuses a dense model; any other works on one."""
    dense = _dense()
    options: dict[str, Any] = {"max_new_tokens": 4}
    if method.has("needs:calibration") and not method.has("steers"):
        return
    if any(method.has(tag) for tag in ("needs:verifier", "may_use:verifier")):
        options["verifier"] = verifier
    if method.has("needs:models"):
        options["models"] = [dense]
    if method.has("needs:calibration"):
        options["calibration"] = "none"
    try:
        decode(dense, tokenizer(), "abc", method.create(), **options)
    except UnsupportedModelError:
        require(method.has("steers"), "it refuses a dense model; say by the tag steers that it must")
        return
    require(not method.has("steers"), "it carries the tag steers and takes a dense model")


def check_tags_are_known(method: Subject) -> None:
    """Every tag means something to this kind."""
    from mixtura.methods import kind

    for tag in method.header.tags:
        require(kind("decoders").explain(tag), f"decoders have no tag {tag!r}")


def check_neutral_settings_exist(method: Subject) -> None:
    """The neutral settings are settings of the method, and it can be made with them."""
    require(isinstance(create("decoders", str(method.header.path), **method.cls.neutral), Decoder), "")


def _dense() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config).eval()


def _state(inside: Any) -> tuple[Any, ...]:
    """All that decoding could leave on a model: what it says, hooks, replaced forwards, attributes."""
    with torch.no_grad():
        said = inside(torch.arange(2, 12)[None]).logits
    hooks = sum(
        len(hooks)
        for module in inside.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )
    own = sum(
        name in vars(module) for module in inside.modules() for name in ("forward", "mixtura_rerouting")
    )
    trained = sum(parameter.requires_grad for parameter in inside.parameters())
    generation = inside.generation_config.to_json_string()
    return said.numpy().tobytes(), hooks, own, trained, inside.training, generation
