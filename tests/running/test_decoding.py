"""What a model's generation_config.json may change of generated text: drawing and ends, checked, no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_checkpoints import save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import mixtura
from mixtura.errors import CheckpointError, UserError
from mixtura.running.decoding import DRAWING, decoding_config
from mixtura.running.evaluate import generate_completions
from mixtura.running.generation import encode_prompt, generate

PROMPT, STEPS = "the quick brown fox", 8

# Entries that a generation_config.json may hold, each with a value that changes something where it is heeded.
ENTRIES: dict[str, Any] = {
    "repetition_penalty": 0.001,
    "no_repeat_ngram_size": 1,
    "guidance_scale": 100.0,
    "suppress_tokens": list(range(3, 40)),
    "begin_suppress_tokens": list(range(40, 64)),
    "bad_words_ids": [[token] for token in range(3, 40)],
    "sequence_bias": [[[token], -100.0] for token in range(3, 40)],
    "exponential_decay_length_penalty": [2, 5.0],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "min_p": 0.9,
    "top_k": 1,
    "top_p": 0.01,
    "typical_p": 0.3,
    "watermarking_config": {"bias": 50.0},
    "num_beams": 3,
    "num_return_sequences": 2,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "dola_layers": "high",
    "use_cache": False,
    "cache_implementation": "static",
    "max_new_tokens": 2,
    "max_length": 3,
    "min_new_tokens": 50,
    "max_time": 0.0,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_hidden_states": True,
    "token_healing": True,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "do_sample": True,
    "temperature": 5.0,
    "bos_token_id": 7,
    "pad_token_id": -1,
    "eos_token_id": -1,
    "an_entry_of_another_runtime": {"a": 1},
}


@pytest.fixture
def model() -> PreTrainedModel:
    made = tiny_model("qwen3_moe")
    assert isinstance(made, PreTrainedModel)
    made.generation_config = GenerationConfig()
    return made


def likeliest(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    """The likeliest token each time, each from a pass over all of the text."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(STEPS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return [int(token) for token in ids[0, len(prompt) :]]


def configure(model: PreTrainedModel, entry: str) -> None:
    """Put one of the entries in the model's configuration, whatever transformers thinks of it."""
    model.generation_config = GenerationConfig()
    setattr(model.generation_config, entry, ENTRIES[entry])


def written(model: PreTrainedModel, **more: Any) -> list[int]:
    return list(generate(model, tiny_tokenizer(), PROMPT, max_new_tokens=STEPS, **more).token_ids)


@pytest.mark.parametrize("entry", ENTRIES)
def test_temperature_zero_takes_the_likeliest_token_whatever_is_configured(
    model: PreTrainedModel, entry: str
) -> None:
    expected = likeliest(model, encode_prompt(tiny_tokenizer(), PROMPT))
    configure(model, entry)
    assert written(model) == expected
    # In a batch, too, where tasks are judged.
    (completion,) = generate_completions(model, tiny_tokenizer(), [PROMPT], STEPS)
    assert completion == tiny_tokenizer().decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("entry", ENTRIES)
def test_drawing_ends_well_whatever_is_configured(model: PreTrainedModel, entry: str) -> None:
    plain = written(model, temperature=0.7)
    configure(model, entry)
    drawn = written(model, temperature=0.7)
    assert len(drawn) == STEPS
    heeded = entry in DRAWING and entry != "renormalize_logits"
    assert (drawn != plain) == heeded


def test_what_is_drawn_by_default_is_not_cut_off(model: PreTrainedModel) -> None:
    prompt = encode_prompt(tiny_tokenizer(), PROMPT)
    config = decoding_config(
        model, 1.0, max_new_tokens=1, output_logits=True, output_scores=True, return_dict_in_generate=True
    )
    made: Any = model.generate(input_ids=prompt[None], generation_config=config)
    # transformers alone would leave the 50 likeliest of these tokens.
    assert torch.equal(made.scores[0], made.logits[0])
    assert made.logits[0].shape[-1] > 50


def test_drawing_as_configured_is_as_transformers_draws(model: PreTrainedModel) -> None:
    own = {"top_k": 9, "top_p": 0.8, "repetition_penalty": 2, "min_p": 0.01, "no_repeat_ngram_size": 2}
    prompt = encode_prompt(tiny_tokenizer(), PROMPT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        floats = own | {"repetition_penalty": 2.0}
        theirs: Any = model.generate(
            input_ids=prompt[None], do_sample=True, temperature=1.5, max_new_tokens=STEPS, **floats
        )
    model.generation_config = GenerationConfig(**own)
    assert written(model, temperature=1.5, seed=3) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("entry", "off"),
    [("top_k", -1), ("top_k", 0), ("no_repeat_ngram_size", -1), ("bad_words_ids", []), ("sequence_bias", [])],
)
def test_none_as_other_runtimes_write_it(model: PreTrainedModel, entry: str, off: Any) -> None:
    plain = written(model, temperature=0.7)
    model.generation_config = GenerationConfig(**{entry: off})
    assert written(model, temperature=0.7) == plain


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("top_k", "many"),
        ("top_k", 1.5),
        ("top_p", 5),
        ("top_p", True),
        ("min_p", -0.1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("guidance_scale", "x"),
        ("bad_words_ids", [[99]]),
        ("bad_words_ids", [[]]),
        ("suppress_tokens", 5),
        ("suppress_tokens", [-3]),
        ("sequence_bias", [[[3], "x"]]),
        ("sequence_bias", {"3": 1.0}),
        ("renormalize_logits", "yes"),
        ("eos_token_id", "</s>"),
        ("stop_strings", [3]),
    ],
)
def test_an_entry_that_cannot_be_is_named(model: PreTrainedModel, entry: str, wrong: Any) -> None:
    setattr(model.generation_config, entry, wrong)
    with pytest.raises(UserError, match=f"{entry} in the model's generation_config.json must be"):
        written(model, temperature=0.7)


def test_strings_and_tokens_that_end_a_text_do(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokens = likeliest(model, encode_prompt(tokenizer, PROMPT))
    last = next(place for place in range(2, STEPS) if tokens[place] not in tokens[:place])
    for ending in ({"stop_strings": tokenizer.decode([tokens[last]])}, {"eos_token_id": [tokens[last]]}):
        model.generation_config = GenerationConfig(**ending)
        assert written(model) == tokens[: last + 1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{broken", r"cannot read \S*generation_config.json: .*write it again"),
        (b"[1]", r"generation_config.json must hold a JSON object; .*write it again"),
        (b"\xff\xfe", r"cannot read \S*generation_config.json: .*write it again"),
        (b'{"early_stopping": "perhaps"}', r"generation_config.json cannot be used \(.*delete it"),
        (b'{"pad_token_id": "x"}', r"generation_config.json cannot be used \(.*delete it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = save_tiny(tmp_path / "model")
    (path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        mixtura.load(path)


def test_a_model_without_an_output_layer_is_refused() -> None:
    base = tiny_model("qwen3_moe").model
    with pytest.raises(UserError, match="Qwen3MoeModel cannot generate text"):
        generate(base, tiny_tokenizer(), PROMPT, max_new_tokens=2)


def test_the_file_is_read_with_the_model(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"top_k": 1, "num_beams": 4}))
    model = mixtura.load(path)
    assert model.generation_config is not None
    assert model.generation_config.num_beams == 4
    assert written(model, temperature=2.0) == written(model)
