"""`MixturaForCausalLM`: a language model that transformers trains, saves, loads and generates with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mixtura.machine.releases import returned_cache, takes_cache, with_cache
from mixtura.methods.routers import Router
from mixtura.modeling.balance import Counts, share_of
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.decoder import (
    MixturaModel,
    MixturaModelOutput,
    MixturaPreTrainedModel,
    frozen_noise,
    noise_seed,
)
from mixtura.modeling.head import make_head
from mixtura.modeling.parts import tags_of
from mixtura.modeling.tokens import IGNORED
from mixtura.types import Routing


@final
@dataclass
class MixturaOutput(MoeCausalLMOutputWithPast):
    """Logits, losses and routing of a forward pass.

    Attributes:
        loss: what is trained: the language model's loss and, in training, ``aux_loss``.
        aux_loss: the routers' own losses and the balancers', already weighted.
        logits: ``[B, Q, V]``.
        router_logits: of each MoE layer, ``[T, E]``, where they were asked for.
        routings: what each MoE layer decided, where it was asked for.
    """

    # Some releases say float32 of tensors in any dtype.
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routings: tuple[Routing, ...] | None = None


@final
class MixturaForCausalLM(MixturaPreTrainedModel, GenerationMixin):
    """A decoder with routers, mixers, experts and balancers of one's choice, and a head.

    In training the loss includes what routers and balancers add. Balancers that keep a state change
    it in `end_step`, once an optimizer step: `BalanceCallback` calls it from transformers' Trainer; in
    a loop of one's own call it after ``optimizer.step()``, before gradients are cleared.

    >>> config = MixturaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, moe={"router": "top_k"})
    >>> model = MixturaForCausalLM(config)
    >>> model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MixturaConfig) -> None:
        super().__init__(config)
        with frozen_noise():
            self.model = MixturaModel(config)
            self.lm_head = make_head(config.hidden_size, config.vocab_size, normed=config.normed_head)
        self.vocab_size = config.vocab_size
        self._two_passes = any("two_passes" in tags_of(block) for block in self.model.blocks)
        self.post_init()

    @takes_cache
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "B Q"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ Q"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B Q D"] | None = None,
        labels: Int[Tensor, "B Q"] | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        token_labels: Mapping[str, Tensor] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MixturaOutput:
        """Logits of the next tokens; with ``labels`` the loss.

        Args:
            input_ids: vocabulary entries; or give ``inputs_embeds``.
            attention_mask: 0 for padding.
            position_ids: where they start again within a row, another document begins.
            past_key_values: the cache of earlier tokens, also by the name that transformers gives it.
            inputs_embeds: tokens as vectors.
            labels: the tokens again (they are shifted here); -100 is not counted.
            use_cache: whether to return keys and values.
            output_router_logits: whether to return every MoE layer's router logits.
            output_routing: whether to return every MoE layer's routing.
            logits_to_keep: of how many last tokens, or of which, logits are wanted; 0 is all.
            token_labels: what is known of tokens by name, such as ``{"domain": [B]}``, for routers that
                read labels.
            num_items_in_batch: labels counted in the whole step, all micro-batches and processes.
        """
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "token_labels": token_labels,
        }  # fmt: skip
        learns = self.training and labels is not None and torch.is_grad_enabled()
        part = self.model.balance.num_parts
        if use_cache is None and self.training:
            use_cache = False
        outputs: MixturaModelOutput = self.model(
            **batch, **with_cache(past_key_values), use_cache=use_cache, part=part, **kwargs
        )
        assert outputs.last_hidden_state is not None
        logits = self.lm_head(_wanted(outputs.last_hidden_state, logits_to_keep))
        assert outputs.routings is not None
        loss, added = None, None
        if labels is not None:
            loss = next_token_loss(logits, labels, num_items_in_batch)
        if learns and outputs.routings:
            assert loss is not None
            loss, added = self._learn(outputs, batch, logits, labels, num_items_in_batch, loss)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return MixturaOutput(
            loss=loss,
            aux_loss=added,
            logits=logits,
            **with_cache(returned_cache(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(one.logits for one in outputs.routings) if output_router_logits else None,
            routings=outputs.routings if output_routing else None,
        )

    def _learn(
        self,
        outputs: MixturaModelOutput,
        batch: Mapping[str, Any],
        logits: Tensor,
        labels: Any,
        num_items: int | Tensor | None,
        loss: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss to train with what routing adds to it; balancers count the part."""
        added = self._added(outputs, labels, num_items)
        if self._two_passes:
            loss, added = self._second_pass(batch, logits, labels, num_items, loss, added)
        assert outputs.routings is not None
        self.model.balance.observe(outputs.routings, _sequences(outputs))
        return loss + added.to(loss.dtype), added

    def _added(
        self, outputs: MixturaModelOutput, labels: Any, num_items: int | Tensor | None, *, again: bool = False
    ) -> Tensor:
        """What routing adds to the loss, weighted by this part's share in the step."""
        balance = self.model.balance
        assert outputs.routings is not None
        added = balance.losses(self.model.places, outputs.routings, _sequences(outputs), again=again)
        num_tokens = int(outputs.routings[0].valid.sum())
        return added * balance.weight(num_tokens, _counted(labels).sum(), num_items)

    def _second_pass(
        self,
        batch: Mapping[str, Any],
        logits: Tensor,
        labels: Any,
        num_items: int | Tensor | None,
        loss: Tensor,
        added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss over two passes with different noise, and what their difference adds."""
        outputs = self.model(**batch, use_cache=False, part=self.model.balance.num_parts, draw=1)
        again = self.lm_head(outputs.last_hidden_state)
        added = (added + self._added(outputs, labels, num_items, again=True)) / 2
        assert outputs.tokens is not None
        # Predictions that are trained, as the loss of labels counts them: none of padding.
        counted = _counted(labels) & outputs.tokens.valid.view(labels.shape)[..., :-1]
        share = 1.0 if num_items is None else share_of(counted.sum(), num_items)
        first, second = logits[..., :-1, :][counted], again[..., :-1, :][counted]
        compared = [block.router for block in self.model.blocks if "two_passes" in tags_of(block)]
        for router in compared:
            assert isinstance(router, Router)
            added = added + share * router.consistency(first, second) / len(compared)
        return (loss + next_token_loss(again, labels, num_items)) / 2, added

    @torch.no_grad()
    def count_ahead(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Route the micro-batches of a step, so that balancers know the whole step's loads in each.

        With several micro-batches or processes a loss over loads is only then that of the whole batch.
        It costs a forward pass. Where the caller gives no ``num_items_in_batch`` and averages its parts'
        losses, each is weighted by its tokens, so that the mean is the loss of the whole batch. Every
        process that trains together calls it; `end_step` forgets it.
        Dropout is drawn after ``torch.manual_seed(model.part_seed(part))``; seed it so before each part's
        training pass, too, for the counts to be exact under dropout.
        """
        names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_labels")
        total: Counts | None = None
        with self._as_trained(), frozen_noise():
            for part, batch in enumerate(batches):
                given = {name: batch[name] for name in names if name in batch}
                labels = batch.get("labels")
                torch.manual_seed(self.part_seed(part))
                routings = self.model(**given, use_cache=False, part=part).routings
                found = Counts.of(routings, 0 if labels is None else int(_counted(labels).sum()))
                total = found if total is None else total.plus(found)
        if total is not None:
            self.model.balance.count_ahead(total)

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Route as in training, whatever mode the model is in."""
        evaluating = not self.training
        if evaluating:
            self.train()
        try:
            yield
        finally:
            if evaluating:
                self.eval()

    def part_seed(self, part: int | None = None) -> int:
        """The seed of one micro-batch of the step at hand on this process; of the next one by default."""
        balance = self.model.balance
        return noise_seed(self.config.seed, int(balance.step), balance.num_parts if part is None else part)

    def end_step(self) -> None:
        """Let the balancers change their states; call it once after every step of the optimizer."""
        self.model.balance.end_step(self.model.places)


def _sequences(outputs: MixturaModelOutput) -> Int[Tensor, " T"]:
    assert outputs.tokens is not None
    return outputs.tokens.sequence_ids


def _wanted(states: Float[Tensor, "B Q D"], tokens: int | Tensor) -> Tensor:
    """The states that logits are wanted of: the last so many, places of all rows or of each, or a mask."""
    # Not every release has a function for it.
    if isinstance(tokens, int):
        return states[:, slice(-tokens, None)]
    if tokens.ndim == 1:
        return states[:, tokens]
    return states[tokens] if tokens.dtype == torch.bool else states.take_along_dim(tokens[..., None], dim=1)


def next_token_loss(
    logits: Float[Tensor, "B Q V"], labels: Int[Tensor, "B Q"], num_items: int | Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean cross entropy of each token given those before it; 0 where no label counts.

    With ``num_items`` the sum is divided by that instead, so that the parts of a batch add up.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    wanted = labels[:, 1:].flatten()
    summed = F.cross_entropy(predicted, wanted, ignore_index=IGNORED, reduction="sum")
    divisor = (wanted != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    return summed / divisor.clamp(min=1).to(summed.device)


def _counted(labels: Int[Tensor, "B Q"]) -> Bool[Tensor, "B P"]:
    """Which tokens predict a label that counts."""
    return labels[..., 1:] != IGNORED


def register() -> None:
    """Make the family known to transformers' Auto classes. Calling it again is harmless."""
    AutoConfig.register(MixturaConfig.model_type, MixturaConfig, exist_ok=True)
    AutoModel.register(MixturaConfig, MixturaModel, exist_ok=True)
    AutoModelForCausalLM.register(MixturaConfig, MixturaForCausalLM, exist_ok=True)
