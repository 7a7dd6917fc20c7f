"""The loop of decoders: the same as generate, forks as if alone, stops, memory, refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import tiny_model
from forking import Forking
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mixtura.authoring.contracts._decoded import model, tokenizer, verifier
from mixtura.errors import SettingError, UnsupportedModelError, UserError
from mixtura.methods import create
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt, View
from mixtura.rerouting import set_router
from mixtura.running.decoders.entry import decode
from mixtura.running.generation import generate
from mixtura.types.steering import Steering

# Softmax with and without normalising, sigmoids with a correction and groups, softmax after the choice.
STEERED = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "jamba", "dots1", "ernie4_5_moe")


@cache
def numbers() -> PreTrainedTokenizerFast:
    """Numbers as tokens, for models of any vocabulary."""
    made = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0")


METHOD = {"tags": ["steers"]}


class Twice(Decoder):
    """Two views of the same text, the second steered; says what both said."""

    def __init__(self, steering: Callable[[Any], Steering]) -> None:
        self.steering = steering
        self.said: list[torch.Tensor] = []

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return (Branch(views=(View(), View(prompt.facts.steer_all(self.steering)))),)

    def mix(self, logits: torch.Tensor, candidates: Sequence[Candidate]) -> torch.Tensor:
        self.said.append(logits.clone())
        return logits[:, 0]


def test_long_prompts_are_read_as_generate_reads_them() -> None:
    prompt = "abcdefgh" * 70
    plain = generate(model(), tokenizer(), prompt, max_new_tokens=8)
    assert decode(model(), tokenizer(), prompt, max_new_tokens=8).token_ids == plain.token_ids


def test_samples_of_one_prompt_are_those_of_generate() -> None:
    ids = torch.tensor([tokenizer().encode("abcde", add_special_tokens=False)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        plain = model().generate(
            ids, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=6, num_return_sequences=4,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    made = decode(model(), tokenizer(), "abcde", "best_of_n", n=4, max_new_tokens=6, seed=7)
    # Up to an end token, which plain generation was told not to heed, rows and draws are the same.
    if all(1 not in one.token_ids for one in made.branches):
        assert [list(one.token_ids) for one in made.branches] == plain[:, 5:].tolist()


def test_a_forked_branch_goes_on_as_its_text_read_anew() -> None:
    made = decode(model(), tokenizer(), "abcde", Forking(), max_new_tokens=9, seed=2)
    first, second = (one.token_ids for one in made.branches)
    assert first[:6] == second[:6]
    inside = model()
    for ids in (first, second):
        text = torch.tensor([[*tokenizer().encode("abcde", add_special_tokens=False), *ids]])
        with torch.no_grad():
            anew = inside(text).logits[0, -2].softmax(-1)
        assert anew[ids[-1]] > 0


@pytest.mark.parametrize("family", STEERED)
def test_steering_acts_inside_every_kind_of_router(family: str) -> None:
    inside: Any = tiny_model(family)
    inside.generation_config.eos_token_id = None
    text = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        plain = inside(text).logits[0, -1].float()
    neutral = Twice(
        lambda layer: Steering(logits=torch.zeros(layer.num_experts), scale=torch.ones(layer.num_experts))
    )
    words = numbers()
    try:
        decode(inside, words, "5 9 3 7", neutral, max_new_tokens=3)
    except UnsupportedModelError as error:
        # In older releases the block of jamba chooses, not its router.
        assert family == "jamba" and "use a newer release" in str(error)  # noqa: PT017, PT018
        return
    for said in neutral.said:
        torch.testing.assert_close(said[:, 0], said[:, 1])
    torch.testing.assert_close(neutral.said[0][0, 0], plain, rtol=1e-4, atol=1e-4)
    moved = Twice(lambda layer: Steering(allowed=torch.arange(layer.num_experts) >= layer.num_experts // 2))
    decode(inside, words, "5 9 3 7", moved, max_new_tokens=3)
    assert not torch.allclose(moved.said[0][0, 0], moved.said[0][0, 1])


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_ranks_are_a_model_of_another_number_of_experts(family: str) -> None:
    inside: Any = tiny_model(family)
    inside.generation_config.eos_token_id = None
    for number in (1, 3):
        other: Any = tiny_model(family)
        for module in other.modules():
            for name in ("top_k", "num_experts_per_tok"):
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, number)
        with torch.no_grad():
            expected = other(torch.tensor([[5, 9, 3, 7]])).logits[0, -1].float()
        ranked = Twice(lambda layer, n=number: Steering(ranks=torch.tensor([0, n])))
        decode(inside, numbers(), "5 9 3 7", ranked, max_new_tokens=1)
        torch.testing.assert_close(ranked.said[0][0, 1], expected, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_but_for_the_cache() -> None:
    sizes: dict[int, int] = {}

    class Watching(Decoder):
        def open(self, prompt: Prompt) -> tuple[Branch, ...]:
            weak = View(prompt.facts.steer_all(lambda layer: Steering(ranks=torch.tensor([1, 2]))))
            return (Branch(views=(View(), weak)),)

        def mix(self, logits: torch.Tensor, candidates: Sequence[Candidate]) -> torch.Tensor:
            number = len(candidates[0].token_ids)
            if number in (200, 1000):
                gc.collect()
                sizes[number] = sum(1 for one in gc.get_objects() if isinstance(one, torch.Tensor))
            return logits[:, 0].index_fill(-1, torch.tensor([1]), -torch.inf)

    decode(model(), tokenizer(), "abcde", Watching(), max_new_tokens=1010)
    assert sizes[1000] <= sizes[200] + 8


def test_composed_decoders_steer_and_search_at_once() -> None:
    parts = [create("decoders", "scmoe"), create("decoders", "best_of_n", n=3)]
    made = decode(model(), tokenizer(), ["abcde", "rs"], parts, max_new_tokens=5)
    assert [len(one.branches) for one in made] == [3, 3]
    same = [create("decoders", "best_of_n", n=2), create("decoders", "self_consistency", n=2)]
    with pytest.raises(
        UserError, match="BestOfN and SelfConsistency cannot be combined: both say how to select"
    ):
        decode(model(), tokenizer(), "abcde", same)


def test_what_is_missing_or_wrong_is_named() -> None:
    inside, words = model(), tokenizer()
    with pytest.raises(UserError, match="Scmoe asks no verifier"):
        decode(inside, words, "a", "scmoe", verifier=verifier)
    with pytest.raises(UserError, match="the verifier gave 1 scores for 2 texts"):
        decode(inside, words, "a", "best_of_n", n=2, verifier=lambda prompt, texts: [1.0])
    with pytest.raises(UserError, match=r"the verifier failed \(ZeroDivisionError"):
        decode(inside, words, "a", "best_of_n", n=2, verifier=lambda prompt, texts: [1 / 0])
    with pytest.raises(UserError, match="must be a finite number"):
        decode(
            inside, words, "a", "best_of_n", n=2, verifier=lambda prompt, texts: [float("nan")] * len(texts)
        )
    with pytest.raises(UserError, match="Scmoe reads no calibration"):
        decode(inside, words, "a", "scmoe", calibration="x")
    with pytest.raises(SettingError, match="did you mean 'beta'"):
        decode(inside, words, "a", "scmoe", bata=1.0)
    with pytest.raises(UserError, match="settings belong to a decoder that is given by its name"):
        decode(inside, words, "a", create("decoders", "scmoe"), beta=1.0)
    with pytest.raises(UserError, match="did you mean 'scmoe'"):
        decode(inside, words, "a", "scmo")


def test_a_model_whose_router_was_replaced_is_refused() -> None:
    inside = tiny_model("qwen3_moe")
    set_router(inside, "top_p", p=0.5)
    with pytest.raises(UserError, match="only a model's own routers can be steered"):
        decode(inside, numbers(), "5 9", "scmoe")


def test_rows_of_a_recurrent_cache_cannot_wait() -> None:
    inside: Any = tiny_model("jamba")
    inside.generation_config.eos_token_id = None
    with pytest.raises(UnsupportedModelError, match="cannot wait for one another"):
        decode(inside, numbers(), "5 9", Forking(), max_new_tokens=4)


def test_prompts_that_end_apart_keep_their_own_steering() -> None:
    """Steerings of tensors are told apart as objects: rows go when a prompt ends, and the others' stay."""

    class Own(Decoder):
        def open(self, prompt: Prompt) -> tuple[Branch, ...]:
            allowed = torch.arange(8) % len(prompt.token_ids) != 1
            return (Branch(views=(View(prompt.facts.steer_all(lambda layer: Steering(allowed=allowed))),)),)

        def force(self, candidate: Candidate) -> tuple[int, ...]:
            ended = len(candidate.token_ids) == len(candidate.prompt.token_ids)
            return candidate.prompt.facts.ends[:1] if ended else ()

    texts = ["abc", "abcde", "fghijkl"]
    together = [one.token_ids for one in decode(model(), tokenizer(), texts, Own(), max_new_tokens=10)]
    assert together == [
        decode(model(), tokenizer(), one, Own(), max_new_tokens=10).token_ids for one in texts
    ]
