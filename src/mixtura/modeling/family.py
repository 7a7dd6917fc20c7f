"""A mixture-of-experts language model of one's own: any router, mixer and balancer, as transformers knows it.

Importing this module makes the family known to transformers' Auto classes:

>>> import mixtura.modeling.family
>>> from transformers import AutoConfig, AutoModelForCausalLM
>>> config = AutoConfig.for_model(
...     "mixtura", vocab_size=64, hidden_size=32, num_hidden_layers=2,
...     moe={"router": {"name": "top_k", "top_k": 2}, "num_experts": 4, "d_expert": 16,
...          "balancers": ["switch_loss"]},
... )
>>> model = AutoModelForCausalLM.from_config(config)
>>> [type(block.router).__name__ for block in model.model.blocks]
['TopK', 'TopK']
"""

from __future__ import annotations

from mixtura.modeling.causal import MixturaForCausalLM, MixturaOutput, register
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.decoder import MixturaModel
from mixtura.modeling.export import export
from mixtura.modeling.plan import Choice, MoEPlan

__all__ = [
    "Choice",
    "MixturaConfig",
    "MixturaForCausalLM",
    "MixturaModel",
    "MixturaOutput",
    "MoEPlan",
    "export",
    "register",
]

register()
