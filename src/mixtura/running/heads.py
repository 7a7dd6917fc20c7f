"""Models whose tokens choose a head each: which heads text chooses, and the model that is left of some."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mixtura.checkpoints.applying.staging import check_place
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.viewing.opening import read_json
from mixtura.data.text import calibration, read
from mixtura.data.tokens import TokenBatch, encode_documents, num_embeddings_of
from mixtura.errors import SettingError, UnsupportedModelError, counted_names
from mixtura.methods.attentions.expert_heads import ExpertHeads
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM
from mixtura.running.loading import load

_BATCH_TOKENS, _LENGTH, _CHARS_PER_TOKEN = 4096, 512, 8
_METHOD = "expert_heads"


@final
class ExpertHeadModel:
    """A model of mixtura's own, all of whose layers have the attention ``expert_heads``.

    Args:
        path: its directory.

    Raises:
        UnsupportedModelError: it is another model, or a layer has another attention.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = read_json(path / "config.json", "give the directory of a model").get("model_type")
        if kind != MixturaConfig.model_type:
            raise UnsupportedModelError(
                f"{path} is a {kind}, whose heads are no experts of which some can go; give a model that "
                f"`mixtura train --attention {_METHOD}` made"
            )
        self.model: Any = load(path).eval()
        self.config: MixturaConfig = self.model.config
        others = {choice.name for choice in self.config.attentions} - {_METHOD}
        if others:
            raise UnsupportedModelError(
                f"layers of {path} have the attention {counted_names(sorted(others))}, whose heads share a "
                f"last matrix; only heads of {_METHOD} can go"
            )

    def text(self, text: Path | None, num_tokens: int) -> TokenBatch:
        """A user's text, or the text that comes with mixtura, in the model's tokens."""
        tokenizer = load_tokenizer(self.path)
        documents = calibration(_CHARS_PER_TOKEN * num_tokens) if text is None else read(text, tokenizer)
        length = min(_LENGTH, self.config.max_position_embeddings)
        return encode_documents(
            documents,
            tokenizer,
            max_length=length,
            max_tokens=num_tokens,
            num_embeddings=num_embeddings_of(self.config),
        )

    @torch.no_grad()
    def usage(self, tokens: TokenBatch) -> Tensor:
        """How many tokens chose each head, by layer ``[L, H]``."""
        total = torch.zeros(self.config.num_hidden_layers, self.config.num_attention_heads, dtype=torch.int64)
        for batch in tokens.split(_BATCH_TOKENS):
            made = self.model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            total += torch.stack([routing.load.long() for routing in made.head_routings])
        return total

    def check_num(self, num: int) -> None:
        """Raise `SettingError` for a number of heads that is none or all."""
        heads = self.config.num_attention_heads
        if not 1 <= num < heads:
            raise SettingError(
                f"--heads is how many of the {heads} heads of a layer stay, from 1 to {heads - 1}, got {num}"
            )

    @staticmethod
    def most_used(usage: Tensor, num: int) -> list[list[int]]:
        """By layer the heads that most tokens chose, in their order; of equals the first."""
        order = usage.sort(dim=-1, descending=True, stable=True).indices[:, :num]
        return [sorted(row.tolist()) for row in order]

    def with_heads(self, kept: Sequence[Sequence[int]]) -> MixturaForCausalLM:
        """The model with only these heads of each layer, as many in each; others' matrices are gone."""
        values = self.config.to_dict()
        values |= {"num_attention_heads": len(kept[0]), "num_key_value_heads": len(kept[0])}
        # The width is the old one, also where it followed from the number of heads.
        values["head_dim"] = self.config.head_dim
        made: MixturaForCausalLM = MixturaForCausalLM(MixturaConfig(**values))
        made.to(self.model.dtype).eval()
        state = dict(self.model.state_dict())
        for place, heads in enumerate(kept):
            attention = self.model.model.layers[place].self_attn
            assert isinstance(attention, ExpertHeads)
            prefix = f"model.layers.{place}.self_attn."
            for name, value in _kept(attention, heads).items():
                state[prefix + name] = value
        made.load_state_dict(state)
        return made


def condense_heads(source: Path, out: Path, num: int, tokens: int, text: Path | None) -> list[list[int]]:
    """Write the model of the heads that a text chooses most; returns them by layer.

    Raises:
        UserError: it cannot be done to this model, or ``num`` is out of range.
        OutputError: ``out`` exists, or cannot be written.
    """
    check_place(out, source)
    opened = ExpertHeadModel(source)
    opened.check_num(num)
    kept = opened.most_used(opened.usage(opened.text(text, tokens)), num)
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    opened.with_heads(kept).save_pretrained(aside)
    load_tokenizer(source).save_pretrained(aside)
    aside.rename(out)
    return kept


def _kept(attention: ExpertHeads, heads: Sequence[int]) -> dict[str, Tensor]:
    """What is left of an attention's tensors; heads that shared keys have copies of their own."""
    width, shared = attention.shape.d_head, attention.shape.num_groups
    found = {"gate": attention.gate[list(heads)]}
    groups = [head // shared for head in heads]
    for name, rows in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        for part, tensor in getattr(attention, name).named_parameters():
            found[f"{name}.{part}"] = _rows(tensor, rows, width)
    return found


def _rows(tensor: Tensor, heads: Sequence[int], width: int) -> Tensor:
    return torch.cat([tensor[head * width : (head + 1) * width] for head in heads])
