"""Read-ME: an expert of each domain's neurons, and one router, ahead of the model, for all layers."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import SettingError, UnmetError, UserError, check_range
from mixtura.methods._parts import part_of
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import needed
from mixtura.types import Action
from mixtura.types.upcycling import Build, Carry, DenseShape, DenseTrace, Recipe, UpcycleShape, array_name

METHOD = {
    "paper": 121,
    "title": "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    "tags": ["own", "reads:domains"],
}


@final
class ReadMe(Upcycler):
    """Keep of every layer what each domain of the text activates most, and decide by the words alone.

    A domain's mask are the ``keep`` of the neurons of largest mean absolute activation on its text. Neurons
    that are in all masks are for every token (the residual); the rest of a mask is that domain's expert. What
    is in no mask is left out. One small network on the words (the router ``read_me``) gives a token one
    expert in all layers, before the model runs; it is taught in ``steps`` steps, from which of the token's
    most active neurons of the dense model are whose.

    Shapes:
        A source of L layers to one expert for each domain of the text, as wide in a layer as ``keep * F``
        less the residual.

    Raises:
        SettingError: ``keep`` is not in [0.01, 0.99], ``steps`` not in [0, 1e6], or ``width`` not an
            even number in [2, 4096].
        UserError: there is no text.
        UnmetError: there are not as many experts as domains, ``keep`` leaves no neuron, or all domains
            activate the same ones.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=12, num_layers=1, num_words=9)
        >>> trace = sample_dense_trace(dense, seed=0)
        >>> recipe = ReadMe().recipe((dense,), UpcycleShape(num_experts=4, top_k=1), trace)
        >>> recipe.own["layers"]
        [{'d_expert': 6, 'shared_width': 0}]

    Differences from the paper:
        There router and model are trained in turns, five rounds of 100 and 200 steps; here the router is
        taught once (500 steps), and training the model is `mixtura train` or `tune`. Its embeddings start
        from noise, there from the model's. A token's most active neurons go by absolute activations, by which
        masks are made; the released code takes them with their signs. Of masks, the released code leaves out
        the neuron at the threshold; here a mask is exactly ``keep`` of them. Domains are those of the given
        text, there seven of RedPajama; more than one expert a token (``--top-k``) is possible.

    Reference:
        Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (paper 121);
        Ruisi Cai, Yeonju Ro, Geon-Woo Kim, Peihao Wang, Babak Ehteshami Bejnordi, Aditya Akella and Zhangyang
        Wang, 2024; repository VITA-Group/READ-ME, ``moe_fication``.
    """

    def __init__(self, *, keep: float = 0.5, steps: int = 500, width: int = 64) -> None:
        check_range("ReadMe", "keep", keep, 0.01, 0.99)
        check_range("ReadMe", "steps", steps, 0, 1e6)
        check_range("ReadMe", "width", width, 2, 4096)
        if width % 2:
            raise SettingError(f"width of ReadMe must be even, for rotary positions, got {width}")
        self.keep, self.steps, self.width = keep, steps, width

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        actions: list[Action] = [Carry((0,), (1.0,))]
        arrays: list[Tensor] = []
        layers: list[dict[str, Any]] = []
        for layer, seen in enumerate(needed(trace, "ReadMe").layers):
            if seen.domains is None:
                raise UserError(
                    "this trace has no activations by domain of text; trace again asking for them"
                )
            residual, own = self._parts(seen.domains, shape.num_experts, layer)
            layers.append({"d_expert": int(own[0].sum()), "shared_width": int(residual.sum())})
            for expert, mask in [(None, residual), *enumerate(own)]:
                if bool(mask.any()):
                    arrays.append(mask.nonzero().squeeze(1).int())
                    actions.append(Build(layer, expert, 0, array_name(arrays[-1])))
        router = {
            "name": "read_me",
            "top_k": shape.top_k,
            "width": self.width,
            "weighted": False,
            "num_words": sources[0].num_words,
        }
        return Recipe.of(actions, arrays, {"moe": {"router": router}, "layers": layers}, self.steps)

    def _parts(
        self, domains: Tensor, num_experts: int, layer: int
    ) -> tuple[Bool[Tensor, " F"], Bool[Tensor, "E F"]]:
        """Which neurons are for every token, and which are each domain's; these are equally many."""
        number = len(domains)
        if number != num_experts:
            raise UnmetError(
                f"one expert is made for each domain of the text, of which there are {number}, not "
                f"{num_experts}; give --experts {number}, or a directory of text with a file for each domain"
            )
        width = part_of(self.keep, domains.shape[1])
        if not width:
            raise UnmetError(f"keep {self.keep:g} of {domains.shape[1]} neurons is none; give a larger keep")
        best = domains.argsort(dim=1, descending=True, stable=True)[:, :width]
        masks = torch.zeros_like(domains, dtype=torch.bool).scatter(1, best, True)
        residual = masks.all(0)
        if bool((masks == residual).all()):
            raise UnmetError(
                f"all {number} domains activate the same {int(residual.sum())} neurons most in layer {layer}"
                ", so that none are left for experts; give a smaller keep, or text of other domains"
            )
        return residual, masks & ~residual
