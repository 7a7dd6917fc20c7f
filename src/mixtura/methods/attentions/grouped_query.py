"""Grouped-query attention: the ordinary attention of language models, whole or in a sliding window."""

from __future__ import annotations

from typing import final

from mixtura.methods.attentions import Attended
from mixtura.methods.attentions._shared import OrdinaryHeads, QueryKeyNorm
from mixtura.types.attending import AttentionInput, AttentionShape

METHOD = {"paper": None, "title": "Grouped-query attention", "tags": ["gives_weights"]}


@final
class GroupedQuery(OrdinaryHeads):
    """Let every token attend to all before it, several heads of queries sharing keys and values.

    With as many heads of keys and values as of queries it is multi-head attention, with one it is multi-query
    attention. Positions are rotary. With ``window`` a token sees the last so many places alone, itself among
    them: sliding window attention, such as some layers of a model have and others have not.

    Shapes:
        ``x [B, Q, D]`` to ``[B, Q, D]``; projections of H queries and G keys and values of W features each,
        and one back.

    Raises:
        SettingError: ``window`` is below 1.

    Example:
        >>> from mixtura.modeling.family import MixturaConfig, MixturaModel
        >>> attention = [{"name": "grouped_query", "window": 4}, "grouped_query"]  # in turn, for all layers
        >>> config = MixturaConfig(hidden_size=32, num_hidden_layers=4, attention=attention)
        >>> [layer.self_attn.window for layer in MixturaModel(config).layers]
        [4, None, 4, None]
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: int | None = None,
        bias: bool = False,
        query_key_norm: QueryKeyNorm = "none",
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(shape, shape, bias=bias, norm=query_key_norm, eps=eps, seed=seed)
        self.window = None if window is None else self.within("window", window, 1, 1 << 40)

    def forward(self, inputs: AttentionInput) -> Attended:
        output, weights = self.ordinary(inputs)
        return output, weights, None
