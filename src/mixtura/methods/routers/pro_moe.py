"""ProMoE: tokens without a condition have an expert of their own, others go to the nearest prototypes."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, cosine_logits
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 17,
    "title": "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance",
    "tags": ["token_independent", "reads:labels", "reads:training"],
}


@final
class ProMoe(Router):
    """Split off unconditional tokens, and send the others to the experts of the most similar prototypes.

    First step: tokens whose label ``conditional`` is 0 go to the last expert alone, with weight 1. Second
    step: any other token goes to the ``per_token`` experts, of the rest, whose learned prototypes have the
    highest cosine with it, weighted by the cosines themselves or by a softmax or a sigmoid of them
    (``weigh_by``). Of equal ones the expert of lowest index is chosen.

    In training the loss ``contrastive`` draws each prototype to the mean of the tokens that chose it
    and away from the means of the others': cross-entropy of their cosines over ``temperature``.

    Shapes:
        ``x [T, D]`` to at most ``T * per_token`` assignments; one parameter, ``prototypes [E - 1, D]``.

    Raises:
        SettingError: ``per_token`` is not in [1, E - 1], ``temperature`` not in [1e-3, 1e3], or
            ``contrastive_coefficient`` not in [0, 1e6].
        UserError: labels named ``conditional`` are not given.

    Example:
        >>> router = ProMoe(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> labels = {"conditional": torch.tensor([0, 0, 1, 1])}
        >>> router(RouterInput.of(torch.eye(4), labels=labels)).load.tolist()[-1]
        2

    Differences from the paper:
        Following the authors' code: one unconditional expert, no balancing loss, and a contrastive loss of
        0 where fewer than two prototypes were chosen. A token whose label is unknown (negative) counts as
        conditional. The variant in which experts choose tokens is left out.

    Cost:
        Tokens and prototypes are scaled to length 1 before they are multiplied, which passes over all D
        features, and in training once more on the way back; the contrastive loss sums the tokens of every
        prototype.

    Reference:
        Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance (paper 17);
        the authors' code, ali-vilab/ProMoE.
    """

    choice_settings = ("per_token",)

    def __init__(
        self,
        shape: LayerShape,
        *,
        per_token: int = 1,
        weigh_by: Literal["softmax", "sigmoid", "cosine"] = "cosine",
        contrastive_coefficient: float = 1.0,
        temperature: float = 0.07,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        if shape.num_experts < 2:
            raise SettingError(
                "ProMoe keeps one expert for unconditional tokens, so it needs two at least, got "
                f"{shape.num_experts}"
            )
        self.per_token = self.within("per_token", per_token, 1, shape.num_experts - 1)
        self.weigh_by = weigh_by
        self.contrastive_coefficient = self.within("contrastive_coefficient", contrastive_coefficient, 0, 1e6)
        self.temperature = self.within("temperature", temperature, 1e-3, 1e3)
        self.seed = seed
        self.prototypes = drawn(seed, shape.num_experts - 1, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        alone = (inputs.label("conditional", "ProMoe") == 0)[:, None]
        cosines = cosine_logits(inputs.x, self.prototypes)
        rated = cosines
        if self.weigh_by != "cosine":
            rated = softmax(cosines) if self.weigh_by == "softmax" else torch.sigmoid(cosines)
        chosen = best(cosines, self.per_token)
        weights = rated.gather(-1, chosen).masked_fill(alone, 1.0)
        last = self.shape.num_experts - 1
        # An unconditional token has one choice only; the further ones are absent.
        only = torch.arange(self.per_token, device=chosen.device) + last
        own = F.one_hot(torch.tensor(last, device=chosen.device), last + 1).to(rated)
        losses = {}
        if inputs.training:
            sure = (inputs.valid & ~alone.squeeze(-1)).nonzero().squeeze(-1)
            contrast = self._contrast(exact(inputs.x)[sure], chosen[sure])
            losses["contrastive"] = self.contrastive_coefficient * contrast
        return self.chose(
            inputs,
            torch.where(alone, only, chosen),
            weights,
            scores=torch.where(alone, own, F.pad(rated, (0, 1))),
            logits=F.pad(cosines, (0, 1)),
            losses=losses,
        )

    @full_precision()
    def _contrast(self, x: Float[Tensor, "N D"], chosen: Int[Tensor, "N K"]) -> Float[Tensor, ""]:
        """How badly prototypes tell the mean of their own tokens from those of the others'."""
        member = F.one_hot(chosen, self.prototypes.shape[0]).sum(1).to(x)
        used = member.any(0).nonzero().squeeze(-1)
        if used.numel() < 2:
            return x.new_zeros(())
        # Sums point where means do.
        cosines = cosine_logits(self.prototypes[used], member[:, used].T @ x, self.temperature)
        return F.cross_entropy(cosines, torch.arange(used.numel(), device=used.device))
