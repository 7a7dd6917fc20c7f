"""Learning which experts suit a text while it is read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Probe, Prompt, View
from mixtura.types.steering import Steering

METHOD = {
    "paper": 22,
    "title": (
        "Rewiring Experts on the Fly:Continuous Rerouting for Better Online Adaptation in "
        "Mixture-of-Expert models"
    ),
    "tags": ["steers", "reads:gradients"],
}


@final
class Rewiring(Decoder):
    """Rewire experts on the fly: learn vectors added to router logits from the text so far, and go on so.

    At the prompt, and again every ``interval`` new tokens, ``steps`` steps of gradient descent on the loss of
    the text so far (each token predicted from those before) change one vector of E numbers a layer; the model
    itself is frozen. Only the share ``layers`` of layers takes part in which routers are surest.

    Shapes:
        Logits [T, E] plus [E] to [T, E].

    Raises:
        SettingError: a setting is out of range.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once. At
        the prompt and every ``interval`` tokens, besides: ``steps`` passes forward and backward over the
        whole text, which keep its activations, and the text is read again.

    Example:
        >>> import torch
        >>> from mixtura.methods.decoders.rewiring import surest
        >>> surest({0: torch.tensor([[0.5, 0.4]]), 3: torch.tensor([[0.9, 0.1]])}, 0.5)
        (0,)

    Differences from the paper:
        No code was found. The paper's formula of confidence is highest for the layer that is least decided,
        though it calls that decided; here layers are ranked by the mean log-probability of chosen experts,
        the highest first, once, at the prompt. The learning rate and the share of layers were not found: 0.1
        and a half. Its soft choice of layers, which scales gradients, is left out. After an update the text
        is read again, so that the cache is that of the new routing.

    Reference:
        Rewiring Experts on the Fly:Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert
        models (paper 22).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __init__(
        self, *, steps: int = 5, rate: float = 0.1, interval: int = 128, layers: float = 0.5
    ) -> None:
        check_range("Rewiring", "steps", steps, 0, 1000)
        check_range("Rewiring", "rate", rate, 0, 1e3)
        check_range("Rewiring", "interval", interval, 1, 1 << 30)
        check_range("Rewiring", "layers", layers, 0, 1)
        self.steps = steps
        self.rate = rate
        self.interval = interval
        self.layers = layers

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        if not self.steps or len(prompt.token_ids) < 2:
            return (Branch(),)
        chosen = surest(self._chosen(prompt), self.layers)
        layers = [layer for layer in prompt.facts.layers if layer.index in chosen]
        start = {layer.index: torch.zeros(layer.num_experts) for layer in layers}
        return (self._branch(self._learnt(prompt.probe, prompt.token_ids, start)),)

    def revise(self, candidate: Candidate) -> Branch | None:
        if not candidate.branch.state or len(candidate.token_ids) % self.interval:
            return None
        text = (*candidate.prompt.token_ids, *candidate.token_ids)
        return self._branch(self._learnt(candidate.prompt.probe, text, candidate.branch.state))

    def _chosen(self, prompt: Prompt) -> dict[int, Float[Tensor, "T K"]]:
        """By layer, the probabilities of the experts that each token of the prompt chose."""
        ran = prompt.probe.run(prompt.token_ids)
        found = {}
        for index, ids in ran.chosen.items():
            scores, absent = ran.probabilities[index], ids >= ran.probabilities[index].shape[-1]
            # The logarithm of an absent choice, which is none, adds nothing.
            found[index] = scores.gather(-1, ids.masked_fill(absent, 0)).masked_fill(absent, 1.0)
        return found

    def _learnt(self, probe: Probe, text: Sequence[int], start: Mapping[int, Tensor]) -> dict[int, Tensor]:
        vectors = {index: vector.clone() for index, vector in start.items()}
        for _ in range(self.steps):
            with torch.enable_grad():
                leaves = {index: vector.requires_grad_() for index, vector in vectors.items()}
                steering = {index: Steering(logits=leaf) for index, leaf in leaves.items()}
                logits = probe.run(text, steering=steering, gradients=True).logits
                loss = F.cross_entropy(logits[:-1], torch.tensor(text[1:], device=logits.device))
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            vectors = {
                index: leaf.detach() if slope is None else leaf.detach() - self.rate * slope
                for (index, leaf), slope in zip(leaves.items(), found, strict=True)
            }
        return vectors

    def _branch(self, vectors: dict[int, Tensor]) -> Branch:
        steering = {index: Steering(logits=vector) for index, vector in vectors.items()}
        return Branch(views=(View(steering),), state=vectors)


def surest(probabilities: Mapping[int, Float[Tensor, "T K"]], share: float) -> tuple[int, ...]:
    """The share of layers whose chosen experts have the highest mean log-probability, at least one."""
    means = {index: float(p.float().clamp(min=1e-12).log().mean()) for index, p in probabilities.items()}
    number = max(1, round(share * len(means)))
    return tuple(sorted(sorted(means, key=lambda index: -means[index])[:number]))
