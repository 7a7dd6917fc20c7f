"""Sites that tests of adapters put them at."""

from __future__ import annotations

from mixtura.types import MatrixShape, Site


def experts_site(layer: int = 0, *, transposed: bool = False, num_experts: int = 4) -> Site:
    """Four experts of width 12 in a model of width 16."""
    shapes = {"up": MatrixShape(24, 16, transposed), "down": MatrixShape(16, 12, transposed)}
    return Site(
        name=f"model.layers.{layer}.mlp.experts",
        kind="experts",
        layer=layer,
        num_layers=4,
        matrices=shapes,
        num_experts=num_experts,
    )


def linear_site(layer: int = 0, *, num_layers: int = 4, name: str = "q_proj") -> Site:
    """A linear layer from 16 to 20 features."""
    return Site(
        name=f"model.layers.{layer}.self_attn.{name}",
        kind="linear",
        layer=layer,
        num_layers=num_layers,
        matrices={"weight": MatrixShape(20, 16)},
    )
