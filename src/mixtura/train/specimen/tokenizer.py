"""The specimen's tokenizer: byte-level BPE of 4,096 tokens in which every digit is a token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mixtura.data.corpora import training_documents
from mixtura.data.tasks import stream
from mixtura.train.specimen.recipe import VOCABULARY, recipe

END = "<|endoftext|>"
PAD = "<|pad|>"
END_ID = 0
NUM_TASKS = 20_000


def _texts() -> Iterator[str]:
    """What the vocabulary is learnt from: the training text and a sample of the training tasks."""
    for domain in ("code", "prose"):
        for document in training_documents(domain):
            yield document.text
    for task in islice(stream("training", recipe().seed), NUM_TASKS):
        yield task.prompt + task.completion


def train_tokenizer() -> Any:
    """Learn the vocabulary and give a transformers tokenizer.

    Every text begins with the token `<|endoftext|>`, which also ends a document: generation stops
    at it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, END_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe().data.sequence_length,
        clean_up_tokenization_spaces=False,
    )


def learn(folder: Path) -> Path:
    """Write the tokenizer to a directory, whole or not at all, where it is not there yet."""
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.part")
        train_tokenizer().save_pretrained(aside)
        aside.rename(folder)
    return folder
