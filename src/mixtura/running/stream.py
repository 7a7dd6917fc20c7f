"""Run a model that is larger than memory: one decoder layer, one expert at a time, from disk.

The model is transformers' own; hooks read the weights of each decoder layer just before it runs and
let them go after, and experts are read when tokens reach them. What is in memory at any time is one
layer without its experts, one expert, the embedding or the head, and the activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.checkpoints.matrices import stored_name
from mixtura.checkpoints.skeleton import AnyView, build, compute_buffers, empty_experts, read_slot
from mixtura.checkpoints.slots import Slot, slots
from mixtura.checkpoints.stores import DiskStore, Instead
from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.checkpoints.viewing.droppable import check_drops
from mixtura.checkpoints.viewing.mask import masked_layer
from mixtura.checkpoints.viewing.memory import MemoryLayer
from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.kernels.saving import refuse_save

DEFAULT_WORKING_BYTES = 1 << 30
LOGITS_BYTES = 64 << 20

OnLogits = Callable[[Tensor, Tensor], None]
OnStates = Callable[[Tensor], None]
OnBoth = Callable[[Tensor, Tensor, Tensor], None]
Changed = Callable[[str, Tensor], Tensor]
# From final states [P, D] to logits [P, V].
Head = Callable[[Tensor], Tensor]


@final
class Streamed:
    """A model of a checkpoint that runs without ever being in memory as a whole.

    ``model`` is a transformers model: call it, or give it to `mixtura.observe` with
    ``layers=view.layers``. Every call reads the whole model from disk once, so make batches large;
    `run` and `hidden` do that within a bound.

    Args:
        view: the checkpoint, from `mixtura.checkpoints.skeleton.open_checkpoint`, or a dense one.
        instead: gives what is to run in an expert's place, to try a plan without writing it: asked by the
            decoder layer's number, the expert's number and the dtype. None for one that runs as it is;
            others are not read.
        dropped: by decoder layer, experts that the router must never choose.
        changed: gives what is to run in place of a tensor outside the experts, asked by its name on disk and
            the tensor. Logits of other states that `run_beside` compares are made without.
        dtype: to compute in; by default the one that the config names.

    Raises:
        UserError: experts are dropped that are not there or cannot go.
        UnsupportedModelError: an adapter or other routers lie beside the checkpoint.
    """

    def __init__(
        self,
        view: AnyView,
        instead: Instead | None = None,
        *,
        dropped: Mapping[int, Collection[int]] | None = None,
        changed: Changed | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_alone(view.path, "a model that runs layer by layer from disk")
        self.view = view
        self._changed = changed
        self.model = build(view, dtype=dtype)
        refuse_save(self.model, "a model that runs from disk")
        kept = check_drops(view.layers, dropped or {})
        self._dropped = {
            layer.index: [e for e in range(layer.num_experts) if e not in kept[layer.index]]
            for layer in view.layers
        }
        for layer in view.layers:
            empty_experts(self.model, layer).mixtura_store = DiskStore(layer, instead)
        self._resident: set[int] = set()
        self._attach()

    def hidden(
        self,
        input_ids: Int[Tensor, "S T"],
        attention_mask: Int[Tensor, "S T"] | None = None,
        *,
        max_bytes: int = DEFAULT_WORKING_BYTES,
    ) -> Float[Tensor, "S T D"]:
        """What the last decoder layer and final norm make of every token.

        Args:
            input_ids: the tokens; padding belongs on the right.
            attention_mask: 0 where a token is padding.
            max_bytes: bound on activations; sequences that do not fit in it together run one batch
                after the other, each of which reads the model again.
        """
        parts = [
            self._outputs(input_ids[rows], None if attention_mask is None else attention_mask[rows])
            for rows in self.batches(*input_ids.shape, max_bytes=max_bytes)
        ]
        return torch.cat([part.last_hidden_state for part in parts])

    def run(
        self,
        input_ids: Int[Tensor, "S T"],
        attention_mask: Int[Tensor, "S T"] | None = None,
        *,
        on_logits: OnLogits,
        wanted: Bool[Tensor, "S T"] | None = None,
        on_states: OnStates | None = None,
        max_bytes: int = DEFAULT_WORKING_BYTES,
        logits_bytes: int = LOGITS_BYTES,
    ) -> None:
        """Compute next-token logits and hand them over in chunks, so that they never exist together.

        Args:
            input_ids: the tokens; padding belongs on the right.
            attention_mask: 0 where a token is padding.
            on_logits: called with ``logits[P, V]`` and ``positions[P]``, places in the flattened
                ``input_ids``; positions come in ascending order.
            wanted: which positions to compute logits for; all that are not padding by default.
            on_states: called with the final states of each batch, as `hidden` returns them, before its
                logits come.
            max_bytes: bound on activations; see `hidden`.
            logits_bytes: bound on the logits of one chunk in float32.
        """
        chunks = self._chunks(input_ids, attention_mask, wanted, max_bytes, logits_bytes, on_states)
        for states, head, _, places in chunks:
            on_logits(head(states), places)

    def run_beside(
        self,
        input_ids: Int[Tensor, "S T"],
        attention_mask: Int[Tensor, "S T"] | None = None,
        *,
        beside: Float[Tensor, "S T D"],
        on_both: OnBoth,
        wanted: Bool[Tensor, "S T"] | None = None,
        max_bytes: int = DEFAULT_WORKING_BYTES,
        logits_bytes: int = LOGITS_BYTES,
    ) -> None:
        """`run` with the logits of other states beside this model's, made by the head as it is stored.

        Args:
            input_ids: the tokens; padding belongs on the right.
            attention_mask: 0 where a token is padding.
            beside: states as `hidden` returned them for another variant of this model.
            on_both: called with this model's ``logits[P, V]``, those of ``beside``, and
                ``positions[P]``.
            wanted: which positions to compute logits for; all that are not padding by default.
            max_bytes: bound on activations; see `hidden`.
            logits_bytes: bound on the logits of one chunk in float32, both together.
        """
        others = beside.flatten(0, 1)
        chunks = self._chunks(input_ids, attention_mask, wanted, max_bytes, logits_bytes // 2)
        for states, head, stored_head, places in chunks:
            on_both(head(states), stored_head(others[places]), places)

    def _chunks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        wanted: Tensor | None,
        max_bytes: int,
        logits_bytes: int,
        on_states: OnStates | None = None,
    ) -> Iterator[tuple[Tensor, Head, Head, Tensor]]:
        """Final states of wanted positions a chunk at a time, the head, that as stored, and their places."""
        if wanted is None:
            wanted = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        chunk = max(1, logits_bytes // (4 * vocabulary))
        for rows in self.batches(*input_ids.shape, max_bytes=max_bytes):
            mask = None if attention_mask is None else attention_mask[rows]
            outputs = self._outputs(input_ids[rows], mask)
            if on_states is not None:
                on_states(outputs.last_hidden_state)
            states = outputs.last_hidden_state.flatten(0, 1)
            first = int(rows[0]) * input_ids.shape[1]
            with self._head(outputs) as (head, stored_head):
                for part in wanted[rows].reshape(-1).nonzero().squeeze(-1).split(chunk):
                    yield states[part], head, stored_head, part + first

    def batches(self, num_sequences: int, length: int, *, max_bytes: int) -> Iterator[Int[Tensor, " rows"]]:
        """Row numbers of the batches in which sequences run, as large as the bound allows.

        Raises:
            SettingError: the bound is not positive.
        """
        if max_bytes < 1:
            raise SettingError(f"max_bytes must be at least 1, got {max_bytes}")
        rows = max(1, max_bytes // (length * self.bytes_per_token(length)))
        yield from torch.arange(num_sequences).split(rows)

    def bytes_per_token(self, length: int) -> int:
        """Bytes of activations that a token of a sequence takes at the widest place of a layer, about."""
        shapes = [(layer.shape, layer.top_k) for layer in self.view.layers]
        config = self.model.config.get_text_config()
        width = max((shape.d_model for shape, _ in shapes), default=int(config.hidden_size))
        matrices = (p for block in self._blocks for p in block.parameters() if p.ndim == 2)
        widest = max((max(matrix.shape) for matrix in matrices), default=width)
        # Residual, norms in float32 and attention beside the rows of all chosen experts; an expert of
        # many tokens has their hidden features as well.
        experts = max((top_k * shape.d_model + 3 * shape.d_expert for shape, top_k in shapes), default=0)
        activations = (10 * width + 3 * widest + experts) * max(self.model.dtype.itemsize, 2)
        # The mask has a column per token; attention that is not fused has one per head as well.
        heads = int(config.num_attention_heads) if config._attn_implementation == "eager" else 0
        return int(activations) + length * (4 + 6 * heads)

    @torch.no_grad()
    def _outputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        return self._base(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
        )

    @property
    def _base(self) -> PreTrainedModel:
        base = self.model.base_model
        if base is self.model or not isinstance(base, PreTrainedModel):
            raise UnsupportedModelError(f"{type(self.model).__name__} has no head that makes logits")
        return base

    @contextmanager
    def _head(self, outputs: Any) -> Iterator[tuple[Head, Head]]:
        """The part of the model after its base: head, scaling, capping; as it is to run, and as it is stored.

        Its weights stay for the block. The model's own forward computes it, with the base standing still at
        states that are given.
        """
        base = self._base
        held = copy.copy(outputs)
        base.forward = lambda *_, **__: held
        head = self.model.get_output_embeddings()
        try:
            with self.kept(head) as own, torch.no_grad():

                def apply(states: Float[Tensor, "P D"]) -> Float[Tensor, "P V"]:
                    held.last_hidden_state = states[None]
                    ids = torch.zeros(1, states.shape[0], dtype=torch.int64)
                    logits = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
                    assert isinstance(logits, Tensor)
                    return logits[0]

                yield apply, self._as_stored(apply, own)
        finally:
            del base.forward

    def _as_stored(self, head: Head, own: Sequence[Slot]) -> Head:
        """The head with its weights as they are stored."""
        pairs = []
        for slot in own if self._changed is not None else ():
            value = read_slot(slot, self.view)
            if value is None:
                continue
            changed = self._as_changed(slot, value)
            if changed is not value:
                slot.fill(changed)
                pairs.append((slot, changed, value))
        if not pairs:
            return head

        def apply(states: Float[Tensor, "P D"]) -> Float[Tensor, "P V"]:
            for slot, _, stored in pairs:
                slot.fill(stored)
            try:
                return head(states)
            finally:
                for slot, changed, _ in pairs:
                    slot.fill(changed)

        return apply

    def _attach(self) -> None:
        """Hooks on every decoder layer, and on each module outside of them that holds weights itself."""
        inside: set[int] = set()
        for block, members in self._blocks.items():
            inside.update(id(module) for module in members)
            self._hook(block, members)
        for module in self.model.modules():
            if id(module) not in inside and slots(module, (module,)):
                self._hook(module, (module,))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layers, in order."""
        return tuple(self._blocks)

    @cached_property
    def _blocks(self) -> dict[nn.Module, tuple[nn.Module, ...]]:
        """Every decoder layer with all modules in it."""
        found = (block for name in self.view.stacks for block in self.model.get_submodule(name).children())
        return {block: tuple(block.modules()) for block in found}

    def _hook(self, module: nn.Module, members: tuple[nn.Module, ...]) -> None:
        own, here = slots(self.model, members), ExitStack()

        def enter(*_: Any) -> None:
            if id(module) not in self._resident:
                here.enter_context(self._present(members, own))

        def leave(*_: Any) -> None:
            if id(module) not in self._resident:
                here.close()

        module.register_forward_pre_hook(enter)
        # Also after an error or Ctrl-C in the layer, so that its weights do not stay behind.
        module.register_forward_hook(leave, always_call=True)

    def _read(self, wanted: Sequence[Slot]) -> None:
        missing = []
        for slot in wanted:
            value = read_slot(slot, self.view)
            if value is None:
                missing.append(slot)
            else:
                slot.fill(self._as_changed(slot, value))
        if missing:
            compute_buffers(self.model, missing)

    def _as_changed(self, slot: Slot, value: Tensor) -> Tensor:
        name = None if self._changed is None else stored_name(slot, self.view)
        return value if name is None or self._changed is None else self._changed(name, value)

    @contextmanager
    def kept(self, module: nn.Module) -> Iterator[Sequence[Slot]]:
        """Keep the weights of a decoder layer, or of a module outside of them, over several calls."""
        members = self._blocks.get(module, (module,))
        own = slots(self.model, members)
        with self._present(members, own):
            self._resident.add(id(module))
            try:
                yield own
            finally:
                self._resident.discard(id(module))

    @contextmanager
    def _present(self, members: Sequence[nn.Module], own: Sequence[Slot]) -> Iterator[None]:
        """Have the weights of some modules in memory, and the experts that are dropped there masked."""
        with ExitStack() as stack:
            stack.callback(_clear, own)
            self._read(own)
            for layer in self.view.layers:
                experts = self._dropped[layer.index]
                if experts and self.model.get_submodule(layer.site.block_name) in members:
                    stack.enter_context(masked_layer(MemoryLayer(layer.site, self.model), experts))
            yield


def _clear(own: Sequence[Slot]) -> None:
    for slot in own:
        slot.clear()
