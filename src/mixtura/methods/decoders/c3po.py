"""Weighting experts as they were for reference samples that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UnsupportedModelError, UserError, check_range
from mixtura.methods.decoders import Branch, Decoder, LayerFacts, ModelFacts, Probe, Prompt, Sample, View
from mixtura.types.steering import Steering

METHOD = {
    "paper": 37,
    "title": (
        "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert Re-Mixing"
    ),
    "tags": ["steers", "needs:calibration"],
}


@final
class C3po(Decoder):
    """Re-mix a prompt's last token: expert probabilities become those of the nearest reference samples.

    Calibration keeps, of each question whose answer the model gives by itself (its answer's tokens are the
    likeliest), a vector of the question and the router's probabilities at its last token. For a prompt the
    ``neighbours`` nearest are mixed by similarity, and in the last ``layers`` layers with experts the
    probabilities of the prompt's last token and of new ones become (1 - alpha) times their own and alpha
    times the mixture.

    Shapes:
        Probabilities [E] of S references to [E].

    Raises:
        SettingError: a setting is out of range.
        UnsupportedModelError: a layer's router scores by something else than a softmax.
        UserError: the calibration is of another model, or no reference was answered right.

    Cost:
        One more forward pass of the prompt. Then one pass a token, of one row: weights outside experts and K
        experts a layer are read once. The file holds S times (D + layers times E) numbers.

    Example:
        >>> import torch
        >>> from mixtura.methods.decoders.c3po import mixture
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> mixture(torch.tensor([1.0, 0.0]), keys, torch.tensor([[0.7, 0.3], [0.1, 0.9]]), 1).tolist()
        [0.699999988079071, 0.30000001192092896]

    Differences from the paper:
        The vector of a text is the mean of the model's own last hidden states, where the paper's code has a
        sentence encoder. As in the code, neighbours' probabilities replace all of the experts' with ``alpha``
        1 (the default is 0.5; the paper finds it by search), and there is no gradient. All E experts are
        mixed, where the paper names 20 core ones. The last layers are 5, as in the code.

    Reference:
        C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert Re-Mixing
        (paper 37); its code, tianyi-lab/C3PO at e4e064a.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    def __init__(self, *, alpha: float = 0.5, neighbours: int = 3, layers: int = 5) -> None:
        check_range("C3po", "alpha", alpha, 0, 1)
        check_range("C3po", "neighbours", neighbours, 1, 100_000)
        check_range("C3po", "layers", layers, 1, 100_000)
        self.alpha = alpha
        self.neighbours = neighbours
        self.layers = layers

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        store = prompt.made_for_it("c3po").tensors
        if not self.alpha:
            return (Branch(),)
        _require_softmax(prompt.facts.layers)
        key = _key(probe=prompt.probe, token_ids=prompt.token_ids)
        steering = {}
        for layer in prompt.facts.layers[-self.layers :]:
            mixed = mixture(key, store["keys"], store[f"probabilities.{layer.index}"], self.neighbours)
            steering[layer.index] = Steering(mixture=mixed, share=torch.tensor(self.alpha))
        return (Branch(views=(View(steering, since="last"),)),)

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        _require_softmax(facts.layers)
        keys: list[Tensor] = []
        kept: dict[int, list[Tensor]] = {layer.index: [] for layer in facts.layers}
        asked = [one for one in samples if 0 < one.answer_from < len(one.token_ids)]
        for one in asked:
            ran = probe.run(one.token_ids)
            answer = torch.tensor(one.token_ids[one.answer_from :])
            said = ran.logits[one.answer_from - 1 : -1].argmax(-1).cpu()
            if torch.equal(said, answer):
                keys.append(ran.hidden[: one.answer_from].mean(0).cpu())
                for index, probabilities in ran.probabilities.items():
                    kept[index].append(probabilities[one.answer_from - 1].float().cpu())
        if not keys:
            raise UserError(
                f"the model gave the whole answer by itself to none of {len(asked)} questions, so that there "
                "is no reference; give more or easier ones"
            )
        tensors = {f"probabilities.{index}": torch.stack(rows) for index, rows in kept.items()}
        return {"references": len(keys), "questions": len(asked)}, {"keys": torch.stack(keys)} | tensors


def mixture(
    key: Float[Tensor, " D"], keys: Float[Tensor, "S D"], probabilities: Float[Tensor, "S E"], number: int
) -> Float[Tensor, " E"]:
    """The nearest references' probabilities, weighted by their cosine similarity where that is positive."""
    likeness = F.cosine_similarity(keys, key[None], dim=-1)
    values, places = likeness.topk(min(number, len(keys)))
    weights = values.clamp(min=1e-6)
    return (weights / weights.sum()) @ probabilities[places]


def _key(*, probe: Probe, token_ids: Sequence[int]) -> Float[Tensor, " D"]:
    return probe.run(token_ids).hidden.mean(0).cpu()


def _require_softmax(layers: Sequence[LayerFacts]) -> None:
    other = next((layer for layer in layers if layer.scoring != "softmax"), None)
    if other is not None:
        raise UnsupportedModelError(
            f"c3po mixes probabilities of a softmax, and layer {other.index} scores by {other.scoring}; "
            "choose another decoder"
        )
