"""Which experts tell two sets of texts apart."""

from __future__ import annotations

import json
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._attribution import attributed, best_of, table_of
from mixtura.methods.analyses._shared import two_domains
from mixtura.types.trace import Trace

METHOD = {
    "paper": 69,
    "title": "Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing",
    "tags": ["needs:choices", "label_dependent"],
}
_FEWEST_TEXTS = 4


@final
class ClassAttribution(Analysis):
    """Audit of two labelled sets of texts: which experts separate them, and in how few is that concentrated?

    A small recurrent classifier learns to tell two ``domains`` apart (the first two of the trace if not
    named) by the experts of each text's tokens, and each expert is credited with what it says for the second.
    ``accuracy`` is on texts held out, beside ``majority``, what always naming the larger set gives; without
    the former being the larger nothing that follows means much. ``top_1``, ``top_5`` and ``top_10`` are the
    shares of all positive credit in so many percent of the experts.

    What a model loses without the experts that are named is for the analysis ``expert_masking``, and how it
    answers for the decoder ``mask_experts``.

    Shapes:
        A trace of L layers with choices [T, K] to L rows.

    Raises:
        SettingError: a setting is out of range.
        UserError: the trace has no choices, not two such domains, or fewer than 4 texts of one.

    Example:
        >>> from dataclasses import replace
        >>> from mixtura.authoring.contracts import sample_trace
        >>> made = replace(sample_trace(), sequence_lengths=(24,) * 10, sequence_domains=(0, 1) * 5)
        >>> report = ClassAttribution(epochs=2).measure(Evidence.of(made))
        >>> 0 < report.scalars["top_5"] <= report.scalars["top_10"] <= 1
        True

    Differences from the paper:
        An audit of any two sets of texts: the label is whose text it is. The search that silences experts
        until a judge finds an answer unsafe is left out on purpose. Accuracy on held-out texts is ours; texts
        are cut at ``most_tokens``.

    Reference:
        Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing (paper 69); what its
        code, jonatelintelo/LargeLanguageLobotomy, is said to do: the sizes of the classifier and its
        training.
    """

    def __init__(
        self, *, domains: list[str] | None = None, epochs: int = 10, most_tokens: int = 128, seed: int = 0
    ) -> None:
        check_range("ClassAttribution", "epochs", epochs, 1, 10_000)
        check_range("ClassAttribution", "most_tokens", most_tokens, 1, 1 << 20)
        self.domains, self.epochs, self.most_tokens, self.seed = domains, epochs, most_tokens, seed

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        pair = two_domains(trace, self.domains or ())
        texts, labels = self._texts(trace, pair)
        names = ("accuracy", "majority", "top_1", "top_5", "top_10")
        if not texts:
            nothing = ({"layer": layer.index, "share": None, "largest": None} for layer in trace.layers)
            return Report(dict.fromkeys(names), tuple(nothing))
        counted = [labels.count(0), labels.count(1)]
        if min(counted) < _FEWEST_TEXTS:
            raise UserError(
                f"there are {counted[0]} texts of {trace.domains[pair[0]]} and {counted[1]} of "
                f"{trace.domains[pair[1]]}, and {_FEWEST_TEXTS} of each are the least; observe more text, or "
                "cut it shorter by --length"
            )
        num_ids = 1 + max(layer.shape.num_experts for layer in trace.layers)
        importance, accuracy = attributed(texts, labels, num_ids, epochs=self.epochs, seed=self.seed)
        credit = importance[:, :-1].clamp(min=0)
        shares = credit / credit.sum().clamp(min=1e-300)
        falling = shares.flatten().sort(descending=True).values
        total = sum(layer.shape.num_experts for layer in trace.layers)
        tops = [float(falling[: -(-total * percent // 100)].sum()) for percent in (1, 5, 10)]
        rows: tuple[dict[str, float | None], ...] = tuple(
            {"layer": layer.index, "share": float(one.sum()), "largest": float(one.max())}
            for layer, one in zip(trace.layers, shares, strict=True)
        )
        best = best_of(trace, shares.tolist())
        scalars = dict(zip(names, (accuracy, max(counted) / sum(counted), *tops), strict=True))
        return Report(
            scalars,
            rows,
            (_told(trace, pair, best, accuracy > max(counted) / sum(counted)),),
            (table_of(trace, pair, best),),
        )

    def _texts(self, trace: Trace, pair: tuple[int, int]) -> tuple[list[Int[Tensor, "_ L K"]], list[int]]:
        """The experts of each text of the two domains, absent ones as one more than there are."""
        absent, top_k = max(x.shape.num_experts for x in trace.layers), max(x.top_k for x in trace.layers)
        texts: list[Tensor] = []
        by_layer = [trace.sequences(layer.index) for layer in trace.layers]
        for place, domain in enumerate(trace.sequence_domains):
            if domain in pair and len(by_layer[0][place]):
                length = min(len(by_layer[0][place]), self.most_tokens)
                made = torch.full((length, len(by_layer), top_k), absent)
                for number, (layer, sequences) in enumerate(zip(trace.layers, by_layer, strict=True)):
                    ids = sequences[place][:length].long()
                    made[:, number, : layer.top_k] = ids.masked_fill(ids >= layer.shape.num_experts, absent)
                texts.append(made)
        return texts, [pair.index(domain) for domain in trace.sequence_domains if domain in pair]


def _told(trace: Trace, pair: tuple[int, int], best: list[tuple[int, int, float]], sure: bool) -> str:
    named = [[layer, expert] for layer, expert, share in best[:5] if share > 0]
    spoken = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in named) or "none"
    first, second = (trace.domains[place] for place in pair)
    if not sure:
        return (
            f"Texts of {first} and {second} that were held out are not told apart better than by naming the "
            "larger set: nothing is known of the experts that separate them."
        )
    compact = json.dumps(named, separators=(",", ":"))
    return (
        f"Of all experts these say most for {second} against {first}: {spoken}. What each set loses without "
        f"them: mixtura observe MODEL --analysis expert_masking --set 'experts={compact}'"
    )
