"""Mathematics that adapters share: factors that start as nothing, and which experts a text reaches most."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from mixtura.errors import SettingError, UserError
from mixtura.methods._drawing import generator_of
from mixtura.methods._scores import crowding, mean_of_valid
from mixtura.methods.adapters import Adapter
from mixtura.types import Change, LowRank, MatrixShape, RouterInput, Routing, Site
from mixtura.types.trace import LayerTrace, Trace

Experts = dict[str, list[int]] | list[int] | None


def site_seed(site: Site, seed: int, what: str = "") -> int:
    """A seed of a site's own, so that no two sites begin alike."""
    return seed + (crc32(f"{site.name}|{what}".encode()) << 1)


def thin_pair(site: Site, name: str, ranks: Sequence[int], seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Factors ``a [M, R, cols]``, as LoRA draws them, and ``b [M, rows, R]`` of zeros, of M matrices.

    R is the highest rank. A matrix of lower rank has rows of zeros in ``a``, which no gradient ever reaches:
    that of ``a`` is a product with ``b``'s zeros, and that of ``b`` with ``a``'s.
    """
    shape, widest = site.matrices[name], max(ranks, default=1)
    generator = generator_of(site_seed(site, seed, name))
    a = torch.empty(len(ranks), widest, shape.cols, device=generator.device)
    a.uniform_(-1.0, 1.0, generator=generator).mul_(shape.cols**-0.5)
    for number, rank in enumerate(ranks):
        a[number, rank:] = 0
    b = torch.zeros(len(ranks), shape.rows, widest)
    return nn.Parameter(a), nn.Parameter(b)


def register_pairs(adapter: Adapter, names: Iterable[str], ranks: Sequence[int], seed: int) -> None:
    """Give an adapter the factors ``NAME_a`` and ``NAME_b`` of matrices of its site; see `thin_pair`."""
    for name in names:
        a, b = thin_pair(adapter.site, name, ranks, seed)
        adapter.register_parameter(f"{name}_a", a)
        adapter.register_parameter(f"{name}_b", b)


def low_rank(a: Tensor, b: Tensor, alpha: float, ranks: Sequence[int]) -> LowRank:
    """The two factors with LoRA's scale, ``alpha`` over each matrix's own rank."""
    return LowRank(a, b, torch.tensor([alpha / rank for rank in ranks], dtype=torch.float64))


def to_shares(routing: Routing) -> Float[Tensor, "T M"]:
    """How much of each LoRA expert each token gets: its weight where it was chosen, 0 where not."""
    places = routing.token_ids, routing.expert_ids
    return torch.zeros_like(routing.scores).index_put(places, routing.weights.to(routing.scores))


def top_shares(scores: Float[Tensor, "T M"], top_k: int, *, renormalize: bool = True) -> Float[Tensor, "T M"]:
    """Each token's ``top_k`` highest scores, over their sum if ``renormalize``, and 0 for the others."""
    chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    kept = scores.gather(-1, chosen)
    if renormalize:
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, chosen, kept)


def balance_loss(
    scores: Float[Tensor, "T M"], chosen: Num[Tensor, "T M"], valid: Bool[Tensor, " T"]
) -> Tensor:
    """M times the product of each expert's share of the choices and its mean score, summed; 1 if balanced."""
    counts = (chosen != 0)[valid].to(scores).sum(0)
    share = counts / counts.sum().clamp(min=1)
    return crowding(share.detach(), mean_of_valid(scores, valid))


class LoraExperts(Adapter, ABC):
    """LoRA experts beside a linear layer, of which tokens get shares: what all such adapters have.

    Attributes:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        num_experts: M.
        balance: coefficient of the loss that keeps them in use.
        seed: of what ``a`` and the router start as.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        num_experts: int,
        balance: float,
        seed: int,
        least_experts: int = 1,
        named: str = "num_experts",
        made: bool = True,
    ) -> None:
        """``made`` is False at a site that is to have no experts."""
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.num_experts = self.within(named, num_experts, least_experts, 1024)
        self.balance = self.within("balance", balance, 0, 1e6)
        self.seed = seed
        if made:
            self.a, self.b = thin_pair(site, "weight", [rank] * num_experts, seed)

    def take(self, library: Sequence[Mapping[str, LowRank]]) -> None:
        if len(library) != self.num_experts:
            raise UserError(
                f"{type(self).__name__} has {self.num_experts} LoRA experts, got {len(library)} LoRAs for "
                f"{self.site.name}; set num_experts={len(library)}"
            )
        for number, one in enumerate(library):
            fill(self.a, self.b, number, one["weight"], self.alpha / self.rank, self.site.name)

    def mixed(self, shares: Float[Tensor, "T M"], losses: Mapping[str, Tensor]) -> Change:
        """The experts' changes, of which each token gets its shares."""
        part = low_rank(self.a, self.b, self.alpha, [self.rank] * self.num_experts)
        return Change(matrices={"weight": part}, shares=shares, losses=losses)

    def balanced(
        self, inputs: RouterInput, scores: Float[Tensor, "T M"], chosen: Float[Tensor, "T M"]
    ) -> dict[str, Tensor]:
        """The loss of Switch that keeps the experts in use, in training and where it has a coefficient."""
        if not (self.balance and inputs.training):
            return {}
        return {"balance": self.balance * balance_loss(scores, chosen, inputs.valid)}


@torch.no_grad()
def fill(a: Tensor, b: Tensor, number: int, one: LowRank, scale: float, where: str) -> None:
    """Put a LoRA in the place of one of several, which are all scaled alike.

    Raises:
        UserError: it is of a higher rank than they, or of another size.
    """
    rank = one.a.shape[1]
    if (one.a.shape[2], one.b.shape[1]) != (a.shape[2], b.shape[1]) or rank > a.shape[1]:
        raise UserError(
            f"a LoRA for {where} is of rank {rank} from {one.a.shape[2]} to {one.b.shape[1]} features; "
            f"experts of rank {a.shape[1]} from {a.shape[2]} to {b.shape[1]} can begin as LoRAs "
            "of at most that rank"
        )
    a[number], b[number] = 0, 0
    a[number, :rank] = one.a[0].to(a)
    b[number, :, :rank] = (one.b[0].double() * float(one.scale[0]) / scale).to(b)


def lora_gate(adapter: LoraExperts) -> nn.Parameter:
    """Router rows ``[M, cols]`` of LoRA experts, as PyTorch draws a linear layer's."""
    return lora_gate_rows(adapter.site, adapter.num_experts, adapter.seed)


def lora_gate_rows(site: Site, num_experts: int, seed: int) -> nn.Parameter:
    """Router rows ``[M, cols]`` at a site, as PyTorch draws a linear layer's."""
    cols = site.matrices["weight"].cols
    generator = generator_of(site_seed(site, seed, "gate"))
    rows = torch.empty(num_experts, cols, device=generator.device)
    return nn.Parameter(rows.uniform_(-1.0, 1.0, generator=generator).mul_(cols**-0.5))


def smallest_side(shapes: Mapping[str, MatrixShape]) -> int:
    """The highest rank that some of the matrices can have at all."""
    return min(min(shape.rows, shape.cols) for shape in shapes.values())


def experts_at(site: Site, experts: Experts, owner: str) -> tuple[int, ...]:
    """Those of a site's experts that are named: for all layers, or by decoder layer; None names all.

    Raises:
        SettingError: there is no such layer, it has no such expert, or one is named twice.
    """
    if experts is None:
        return tuple(range(site.num_experts))
    for key in experts if isinstance(experts, Mapping) else ():
        check_layer(site, key, f"experts of {owner}")
    named = experts.get(str(site.layer), []) if isinstance(experts, Mapping) else experts
    wrong = [e for e in named if not 0 <= e < site.num_experts]
    if wrong:
        raise SettingError(
            f"experts of {owner} name {wrong[0]} in layer {site.layer}, which has experts 0 to "
            f"{site.num_experts - 1}"
        )
    if len(set(named)) < len(named):
        raise SettingError(f"experts of {owner} name an expert of layer {site.layer} twice")
    return tuple(sorted(named))


def check_layer(site: Site, key: str, what: str) -> None:
    """Raise `SettingError` unless a key is the number of one of the model's decoder layers."""
    if not (key.isdecimal() and int(key) < site.num_layers):
        raise SettingError(f"{what} name layer {key!r}; the model has layers 0 to {site.num_layers - 1}")


def chosen_by(trace: Trace, score: Literal["gate", "token"], top_p: float) -> dict[str, list[int]]:
    """By decoder layer the experts a text reaches most: the fewest whose scores sum to ``top_p`` at least.

    ``token`` scores an expert by its share of the assignments, ``gate`` by its share of the weights.
    """
    return {str(layer.index): _most_reached(_shares(layer, score), top_p) for layer in trace.layers}


def _shares(layer: LayerTrace, score: str) -> Float[Tensor, " E"]:
    sums = (layer.weight_sums if score == "gate" else layer.counts).double().sum(0)
    return sums / sums.sum().clamp(min=1e-300)


def _most_reached(shares: Float[Tensor, " E"], top_p: float) -> list[int]:
    found, total = [], 0.0
    for expert in torch.sort(shares, descending=True, stable=True).indices.tolist():
        if total >= top_p:
            break
        found.append(int(expert))
        total += float(shares[expert])
    return sorted(found)


def chosen_settings(trace: Trace, given: Mapping[str, Any], score: str, top_p: float) -> dict[str, Any]:
    """The setting ``experts`` where it is not given and some text is to decide."""
    score, top_p = str(given.get("score", score)), float(given.get("top_p", top_p))
    if given.get("experts") is not None or score == "all":
        return {}
    return {"experts": chosen_by(trace, "gate" if score == "gate" else "token", top_p)}


def check_score(owner: str, score: str) -> str:
    """The setting ``score``, if it is one of those there are.

    Raises:
        SettingError: it is not.
    """
    if score not in ("all", "gate", "token"):
        raise SettingError(f"score of {owner} must be all, gate or token, got {score!r}")
    return score
