"""Rotary positions as llama.cpp is told of them."""

from __future__ import annotations

from typing import Any

_YARN = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor", "partial_rotary_factor",
}  # fmt: skip
# What latent attention has besides: its scale is raised by these.
_LATENT = {"mscale", "mscale_all_dim"}


def rotary_fields(config: Any, *, latent: bool) -> dict[str, Any]:
    """The base and the scaling of rotary positions under llama.cpp's names."""
    rope = config.rope_parameters
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return found
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = float(rope[name])
        if latent and rope.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return found


def rotary_objections(config: Any, *, latent: bool) -> list[str]:
    """What in a model's rotary positions llama.cpp computes otherwise, in words."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        return [f"rotary positions of the types default, linear and yarn, not {kind}"]
    found = []
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("rotary positions on whole heads (no partial_rotary_factor)")
    if kind == "yarn":
        given = {name for name, value in rope.items() if value is not None}
        other = sorted(given - _YARN - (_LATENT if latent else set()))
        found += [f"no {name} in its yarn" for name in other]
        if rope.get("attention_factor") is not None:
            found.append("yarn's own attention_factor")
        if latent and rope.get("mscale") != rope.get("mscale_all_dim"):
            found.append("the same mscale and mscale_all_dim")
    return found
