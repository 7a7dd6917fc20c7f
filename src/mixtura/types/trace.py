"""What one pass over text saw of a model's experts, as a record that saves and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixtura.errors import UnknownNameError, UserError, suggest
from mixtura.types import LayerShape
from mixtura.types.saving import save_tensors

_FOR_AN_ANALYSIS = " (mixtura observe MODEL --analysis NAME --save FILE keeps what the analysis reads)"
_VERSION = "1"
_TOKEN_IDS = "token_ids"
# What may be kept of every expert beside its statistics, one row each.
FEATURES = {
    "mean_output": "the mean of the expert's outputs, before they are weighted, over its tokens",
    "logit_products": "the products of its router logit and every expert's, added up over all tokens",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """What was seen of one MoE layer, by domain. The letter M counts domains.

    Attributes:
        index: number of the decoder layer.
        shape: sizes of the layer.
        top_k: K, experts chosen per token.
        num_groups: groups a router limits its choice to; 1 where there is no such limit.
        top_groups: groups a token may choose from, of those.
        expert_num_bytes: bytes of one expert as stored.
        counts: assignments per domain and expert.
        weight_sums: sum of routing weights per domain and expert.
        statistics: by name, the statistic per domain and expert, already reduced (a mean over the
            expert's assignments in that domain, or a maximum; 0 where there were none).
        features: by a name of `FEATURES`, a row of numbers for every expert, of all domains together.
        coactivation: how often two experts were chosen for the same token.
        transitions: how often expert i here was followed by expert j in the next MoE layer, for the
            same token; `None` in the last layer.
        choices: optionally every valid token's experts, in the order of the text; ids of E or more
            are absent choices.
        logits: optionally what the router's matrix made of every `Trace.logits_every`-th valid token.
    """

    index: int
    shape: LayerShape
    top_k: int
    num_groups: int
    expert_num_bytes: int
    counts: Int[Tensor, "M E"]
    weight_sums: Float[Tensor, "M E"]
    statistics: Mapping[str, Float[Tensor, "M E"]] = field(default_factory=dict)
    features: Mapping[str, Float[Tensor, "E _"]] = field(default_factory=dict)
    coactivation: Int[Tensor, "E E"] | None = None
    transitions: Int[Tensor, "E E2"] | None = None
    choices: Int[Tensor, "T K"] | None = None
    logits: Float[Tensor, "S E"] | None = None
    top_groups: int = 1

    @property
    def load(self) -> Int[Tensor, " E"]:
        """Assignments per expert over all domains."""
        return self.counts.sum(0)

    def statistic(self, name: str) -> Float[Tensor, " E"]:
        """A statistic per expert over all domains: means are weighted by count, maxima taken.

        Raises:
            UserError: the pass did not record it.
        """
        if name not in self.statistics:
            raise UserError(
                f"this trace has no statistic {name!r}; {suggest(name, self.statistics)}; "
                f"observe again asking for it"
            )
        values = self.statistics[name]
        if name.startswith("max_"):
            return values.amax(0)
        return (values * self.counts).sum(0) / self.counts.sum(0).clamp(min=1)

    def feature(self, name: str) -> Float[Tensor, "E _"]:
        """A row of numbers for every expert.

        Raises:
            UserError: the pass did not record it, or only one domain's part of the trace is left.
        """
        if name not in self.features:
            raise UserError(
                f"this trace has no feature {name!r}; {suggest(name, self.features)}; observe again asking "
                "for it, on the text of all domains that are to count"
            )
        return self.features[name]

    def total(self, name: str) -> Float[Tensor, "M E"]:
        """A statistic added up over each expert's assignments, by domain; not for a maximum.

        Raises:
            UserError: the pass did not record it.
        """
        self.statistic(name)
        return self.statistics[name].double() * self.counts


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one pass over text saw of every MoE layer of a model.

    Attributes:
        source_digest: digest of the model that was observed.
        model_type: its transformers family.
        domains: names of the text's domains, in the order of the M axis.
        num_tokens: valid tokens per domain.
        layers: one record per MoE layer, in order.
        sequence_lengths: tokens of each sequence of the text, in order, where that is known; what belongs to
            a sequence in ``choices``.
        sequence_domains: the place of each sequence's domain, likewise.
        token_ids: optionally which token each valid one is, in the order of the text.
        logits_every: of how many tokens one is in the layers' ``logits``, the first being in.
        step: of training, where the model is a checkpoint of one and says so.
    """

    source_digest: str
    model_type: str
    domains: tuple[str, ...]
    num_tokens: tuple[int, ...]
    layers: tuple[LayerTrace, ...]
    sequence_lengths: tuple[int, ...] = ()
    sequence_domains: tuple[int, ...] = ()
    token_ids: Int[Tensor, " T"] | None = None
    logits_every: int = 1
    step: int | None = None

    def sequences(self, index: int) -> tuple[Int[Tensor, "T K"], ...]:
        """The experts of each token of decoder layer ``index``, sequence by sequence.

        Raises:
            UserError: that layer has no experts, or the pass did not keep choices or sequences.
        """
        choices = self.layer(index).choices
        if choices is None or sum(self.sequence_lengths) != len(choices):
            raise UserError(
                "this trace does not have every token's experts by sequence; observe again with "
                f"keep_choices=True{_FOR_AN_ANALYSIS}"
            )
        found: tuple[Tensor, ...] = choices.split(list(self.sequence_lengths))
        return found

    def vocabulary_entries(self) -> Int[Tensor, " T"]:
        """Which token each valid one is, in the order of ``choices``.

        Raises:
            UserError: the pass did not keep them.
        """
        if self.token_ids is None or len(self.token_ids) != sum(self.num_tokens):
            raise UserError(
                "this trace does not say which token each one is; observe again with "
                f"keep_choices=True{_FOR_AN_ANALYSIS}"
            )
        return self.token_ids

    def logits(self, index: int) -> Float[Tensor, "S E"]:
        """What the router of decoder layer ``index`` made of some tokens, evenly over the text.

        Raises:
            UserError: that layer has no experts, or the pass did not keep logits.
        """
        found = self.layer(index).logits
        if found is None:
            raise UserError(
                f"this trace has no logits of routers; observe again with keep_logits=4096{_FOR_AN_ANALYSIS}"
            )
        return found

    def sequence_of_logits(self) -> Int[Tensor, " S"]:
        """The number of the sequence of each row of ``logits``."""
        lengths = torch.tensor(self.sequence_lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:: self.logits_every]

    def layer(self, index: int) -> LayerTrace:
        """The record of decoder layer `index`.

        Raises:
            UserError: that decoder layer has no experts.
        """
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise UserError(f"layer {index} has no experts; the MoE layers are {[x.index for x in self.layers]}")

    def of(self, domain: str) -> Trace:
        """The part that one domain's text made, to plan for that domain alone.

        Features, co-activation, transitions, choices and logits are not kept by domain, and are absent.

        Raises:
            UnknownNameError: the trace has no such domain.
        """
        if domain not in self.domains:
            raise UnknownNameError("domain in this trace", domain, self.domains)
        place = self.domains.index(domain)
        only = slice(place, place + 1)
        layers = tuple(
            replace(
                layer,
                counts=layer.counts[only],
                weight_sums=layer.weight_sums[only],
                statistics={name: values[only] for name, values in layer.statistics.items()},
                features={},
                coactivation=None,
                transitions=None,
                choices=None,
                logits=None,
            )
            for layer in self.layers
        )
        return replace(
            self,
            domains=(domain,),
            num_tokens=self.num_tokens[only],
            layers=layers,
            sequence_lengths=(),
            sequence_domains=(),
            token_ids=None,
        )

    def save(self, path: Path) -> None:
        """Write the trace as one safetensors file, its scalars in the header."""
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for number, layer in enumerate(self.layers):
            for name, tensor in _tensors_of(layer).items():
                tensors[f"{number}.{name}"] = tensor.contiguous()
            shape = layer.shape
            layers.append(
                {
                    "index": layer.index,
                    "shape": [shape.d_model, shape.d_expert, shape.num_experts],
                    "top_k": layer.top_k,
                    "num_groups": layer.num_groups,
                    "top_groups": layer.top_groups,
                    "expert_num_bytes": layer.expert_num_bytes,
                }
            )
        header = {
            "mixtura_trace": _VERSION,
            "source_digest": self.source_digest,
            "model_type": self.model_type,
            "domains": json.dumps(self.domains),
            "num_tokens": json.dumps(self.num_tokens),
            "layers": json.dumps(layers),
            "sequence_lengths": json.dumps(self.sequence_lengths),
            "sequence_domains": json.dumps(self.sequence_domains),
            "logits_every": json.dumps(self.logits_every),
            "step": json.dumps(self.step),
        }
        if self.token_ids is not None:
            tensors[_TOKEN_IDS] = self.token_ids.contiguous()
        save_tensors(tensors, path, header)

    @staticmethod
    def load(path: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or it is not a trace of this version.
        """
        if path.is_dir():
            raise UserError(
                f"{path} is a directory, and a trace is a file; give one, or make it of a model with "
                f"mixtura observe {path} --save FILE"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a trace that can be read: {error}") from None
        if header.get("mixtura_trace") != _VERSION:
            raise UserError(f"{path} is not a trace of version {_VERSION}; observe the model again")
        layers = [
            _layer_from(number, values, tensors) for number, values in enumerate(json.loads(header["layers"]))
        ]
        return Trace(
            source_digest=header["source_digest"],
            model_type=header["model_type"],
            domains=tuple(json.loads(header["domains"])),
            num_tokens=tuple(json.loads(header["num_tokens"])),
            layers=tuple(layers),
            # Traces of before have none.
            sequence_lengths=tuple(json.loads(header.get("sequence_lengths", "[]"))),
            sequence_domains=tuple(json.loads(header.get("sequence_domains", "[]"))),
            token_ids=tensors.get(_TOKEN_IDS),
            logits_every=json.loads(header.get("logits_every", "1")),
            step=json.loads(header.get("step", "null")),
        )


def _tensors_of(layer: LayerTrace) -> dict[str, Tensor]:
    optional: Sequence[tuple[str, Tensor | None]] = (
        ("coactivation", layer.coactivation),
        ("transitions", layer.transitions),
        ("choices", layer.choices),
        ("logits", layer.logits),
    )
    named = {"counts": layer.counts, "weight_sums": layer.weight_sums}
    named.update({name: tensor for name, tensor in optional if tensor is not None})
    named.update({f"statistic.{name}": tensor for name, tensor in layer.statistics.items()})
    named.update({f"feature.{name}": tensor for name, tensor in layer.features.items()})
    return named


def _layer_from(number: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerTrace:
    prefix = f"{number}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return LayerTrace(
        index=values["index"],
        shape=LayerShape(*values["shape"]),
        top_k=values["top_k"],
        num_groups=values["num_groups"],
        top_groups=values["top_groups"],
        expert_num_bytes=values["expert_num_bytes"],
        counts=own["counts"],
        weight_sums=own["weight_sums"],
        statistics={n.removeprefix("statistic."): t for n, t in own.items() if n.startswith("statistic.")},
        features={n.removeprefix("feature."): t for n, t in own.items() if n.startswith("feature.")},
        coactivation=own.get("coactivation"),
        transitions=own.get("transitions"),
        choices=own.get("choices"),
        logits=own.get("logits"),
    )
