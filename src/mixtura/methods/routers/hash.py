"""Hash routing: a fixed table sends every vocabulary entry to its experts."""

from __future__ import annotations

import heapq
from typing import Literal, final

import torch
from jaxtyping import Int, Num
from torch import Tensor

from mixtura.methods._drawing import generator_of
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import check_counts
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Hash Layers For Large Sparse Models",
    "tags": ["normalized", "token_independent", "reads:token_ids"],
}


@final
class Hash(Router):
    """Send each token to experts looked up in a fixed table by its vocabulary entry.

    Nothing is learned and nothing collapses. With ``assignment="random"`` each of ``num_words`` entries gets
    experts drawn at random; with ``"balanced"`` all experts get equally many entries. Entries are used
    unequally often: `refit` takes their counts in a text and evens out the experts' loads by them. The
    ``top_k`` experts of an entry differ and weigh ``1 / top_k`` each. Entries of ``num_words`` or more
    start the table again from its beginning.

    Shapes:
        ``token_ids [T]`` to ``T * top_k`` assignments; no parameters, one buffer ``table [V, top_k]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``num_words`` not in [1, 1e8].
        UserError: token ids are not given.

    Example:
        >>> router = Hash(LayerShape(d_model=2, d_expert=8, num_experts=4), num_words=8)
        >>> words = torch.arange(8)
        >>> router(RouterInput.of(torch.zeros(8, 2), token_ids=words)).load.tolist()
        [2, 2, 2, 2]

    Differences from the paper:
        With ``top_k`` above 1 the paper's MultiHash joins slices of experts chosen by several hashes;
        here whole experts are averaged. Its clustered tables, which need a trained embedding, and its
        hashes of pairs of tokens are left out.

    Reference:
        Hash Layers For Large Sparse Models.
    """

    table: Int[Tensor, "V K"]

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        num_words: int = 32768,
        assignment: Literal["random", "balanced"] = "balanced",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_words = self.within("num_words", num_words, 1, 1e8)
        self.assignment = assignment
        self.seed = seed
        generator = generator_of(seed)
        drawn = torch.rand(num_words, shape.num_experts, generator=generator, device=generator.device)
        ranked = drawn.argsort(-1)[:, :top_k]
        if assignment == "balanced":
            place = drawn[:, 0].argsort().argsort()[:, None]
            # Each run of E entries meets every expert; from run to run other experts go together.
            steps = max((shape.num_experts - 1) // max(top_k - 1, 1), 1)
            apart = 1 + (place // shape.num_experts) % steps
            ranked = (place + apart * torch.arange(top_k, device=place.device)) % shape.num_experts
        self.register_buffer("table", ranked)

    def forward(self, inputs: RouterInput) -> Routing:
        words = inputs.need("token_ids", "Hash")
        chosen = self.table[words % self.num_words]
        shares = torch.full_like(chosen, 1 / self.top_k, dtype=inputs.x.dtype)
        scores = shares.new_zeros(chosen.shape[0], self.shape.num_experts).scatter(-1, chosen, shares)
        return Routing.from_choices(chosen, shares, scores=scores, logits=scores, valid=inputs.valid)

    @torch.no_grad()
    def refit(self, counts: Num[Tensor, " V"]) -> None:
        """Make the table anew so that experts are about equally busy on a text with these word counts.

        The most frequent entry comes first; each goes to the experts least busy so far.

        Raises:
            UserError: there is not one count, finite and not negative, for each of ``num_words`` entries.
        """
        check_counts("Hash", counts, self.num_words)
        often = counts.tolist()
        busy: list[tuple[float, int]] = [(0.0, expert) for expert in range(self.shape.num_experts)]
        for word in torch.sort(counts, descending=True, stable=True).indices.tolist():
            least = [heapq.heappop(busy) for _ in range(self.top_k)]
            self.table[word] = self.table.new_tensor([expert for _, expert in least])
            for load, expert in least:
                heapq.heappush(busy, (load + often[word], expert))
