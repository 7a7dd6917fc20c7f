"""The one way from text to tokens, wherever a model reads: start token, halves of characters, embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_checkpoints import save_tiny, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data.reading import read
from mixtura.data.tokens import encode_documents, encode_text, encode_texts, vocabulary_size
from mixtura.errors import UserError
from mixtura.fitting.texts import load_texts
from mixtura.running.evaluate import generate_completions
from mixtura.running.generation import encode_prompt, generate
from mixtura.running.observing.checkpoint import read_text
from mixtura.train.config import build_config
from mixtura.train.run import _model_config
from mixtura.train.text import streams_of

WORDS = "hello there, how are you today. "


def starting_tokenizer() -> Any:
    """Begins every text with <s>, which its chat template writes, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    return tokenizer


def read_by_all(file: Path, tokenizer: Any, num_embeddings: int | None = None) -> dict[str, list[list[int]]]:
    """The tokens of a file's documents as each part reads them, one after another or in sequences."""
    observed = encode_documents(read(file, tokenizer), tokenizer, num_embeddings=num_embeddings)
    texts = load_texts(
        file,
        tokenizer,
        length=64,
        calibration_tokens=10_000,
        held_out_tokens=10_000,
        seed=0,
        num_embeddings=num_embeddings,
    )
    parts = (*texts.calibration, *texts.held_out)
    (stream,) = streams_of([], str(file), tokenizer, 0).values()
    return {
        "observe": _rows(observed.input_ids, observed.attention_mask),
        "fit": [row for part in parts for row in _rows(part.input_ids, part.attention_mask)],
        "train": [stream.tolist()],
    }


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def test_the_start_token_comes_once_whoever_writes_it(tmp_path: Path) -> None:
    tokenizer = starting_tokenizer()
    start = tokenizer.bos_token_id
    file = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"{WORDS}{number}"}] for number in range(12)]
    file.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    expected = [tokenizer.apply_chat_template(one, tokenize=True, return_dict=False) for one in turns]
    assert all(ids.count(start) == 1 and ids[0] == start for ids in expected)
    found = read_by_all(file, tokenizer)
    for name in ("observe", "fit"):
        assert sorted(found[name]) == sorted(expected), name
    assert found["train"][0].count(start) == 12
    assert sorted(found["train"][0]) == sorted(token for ids in expected for token in ids)
    for prompt, chat in (("hi", True), ("hi", False), ("<s>hi", False)):
        assert encode_prompt(tokenizer, prompt, chat=chat).tolist().count(start) == 1


def test_questions_and_their_answers_have_one_start_token(tmp_path: Path) -> None:
    tokenizer = starting_tokenizer()
    file = tmp_path / "asked.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": f"<s>{WORDS}", "answer": f"it is {n}"}) for n in range(12))
    )
    for ids in read_by_all(file, tokenizer)["fit"]:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_texts_at_once_are_encoded_as_one_by_one() -> None:
    tokenizer = starting_tokenizer()
    texts = ["abc", "<s>abc", "", "a\ud83d", "xyz"]
    assert encode_texts(texts, tokenizer) == [encode_text(text, tokenizer) for text in texts]
    assert encode_texts([], tokenizer) == []
    plain = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert encode_text("abc", tokenizer, begin=False) == plain
    assert (
        encode_text("abc", tokenizer) == encode_text("<s>abc", tokenizer) == [tokenizer.bos_token_id, *plain]
    )


def test_halves_of_characters_have_the_tokens_of_the_character_in_their_place() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\ufffd", "\U0001f600"])
    for half in ("\ud83d", "\udc80", "\ude00\ud83d"):
        expected = tokenizer("ab" + "\ufffd" * len(half))["input_ids"]
        assert encode_text(f"ab{half}", tokenizer) == expected
        assert encode_prompt(tokenizer, f"ab{half}").tolist() == expected
    # Two that belong together are one character.
    assert encode_text("ab\ud83d\ude00", tokenizer) == tokenizer("ab\U0001f600")["input_ids"]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 embeddings whose tokenizer has 90 tokens, the padding token last."""
    path = save_tiny(tmp_path_factory.mktemp("crowded") / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"tok{number}" for number in range(29)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(path)
    return path


def test_tokens_without_an_embedding_are_named(crowded: Path, tmp_path: Path) -> None:
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.loading import load

    tokenizer, view, model = load_tokenizer(crowded), open_checkpoint(crowded), load(crowded)
    says = f"the tokenizer has {len(tokenizer)} tokens, the model 64 embeddings, and the text has token 8"
    file = tmp_path / "text.txt"
    file.write_text(f"tok28 {WORDS}" * 60)
    with pytest.raises(UserError, match=says):
        read_text(view, file, max_tokens=200, max_length=64)
    with pytest.raises(UserError, match=says):
        read_by_all(file, tokenizer, 64)
    with pytest.raises(UserError, match=says):
        load_texts(
            file,
            tokenizer,
            length=64,
            calibration_tokens=500,
            held_out_tokens=500,
            seed=0,
            num_embeddings=64,
        )
    with pytest.raises(UserError, match=says):
        generate(model, tokenizer, "hello tok28", max_new_tokens=2)
    with pytest.raises(UserError, match=says):
        generate_completions(model, tokenizer, ["hello tok28"], 2)


def test_tokens_that_no_text_has_are_no_matter(crowded: Path, tmp_path: Path) -> None:
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.loading import load

    tokenizer, model = load_tokenizer(crowded), load(crowded)
    assert tokenizer.pad_token_id >= 64
    assert len(generate(model, tokenizer, "hello", max_new_tokens=2).token_ids) == 2
    # Two of different lengths are padded, with a token that there is.
    alone = [generate_completions(model, tokenizer, [text], 4)[0] for text in ("hello", "hi")]
    assert generate_completions(model, tokenizer, ["hello", "hi"], 4) == alone
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 10 + "\n")
    batch = read_text(open_checkpoint(crowded), file, max_tokens=200, max_length=64)
    assert int(batch.input_ids.max()) < 64


def test_a_model_of_ones_own_has_an_embedding_for_every_token() -> None:
    tokenizer = tiny_tokenizer()
    assert vocabulary_size(tokenizer) == len(tokenizer)
    # Ids may have gaps.
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"]["z"] = 99
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    gapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), unk_token="<unk>"
    )
    assert len(gapped) < 100
    assert vocabulary_size(gapped) == 100
    assert _model_config(build_config({}), gapped).vocab_size == 100
    with pytest.raises(UserError, match="the tokenizer has 100 tokens, but vocab_size is 64"):
        _model_config(build_config({"model": {"vocab_size": 64}}), gapped)


def test_the_model_reads_a_prompt_with_halves() -> None:
    assert (
        len(generate(tiny_model("qwen3_moe"), tiny_tokenizer(), "a\udc80", max_new_tokens=2).token_ids) >= 1
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('system first') }}",
        "{% for m in messages %}{{ m.a.b }}{% endfor %}",
        "{% for m in messages %}{{ m",
        "{{ messages | nofilter }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_that_fails_is_a_sentence(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        UserError, match="the model's chat template does not take the messages in the prompt: "
    ):
        encode_prompt(tokenizer, "hello", chat=True)
