"""Adapters of the catalogue in models of transformers, as one type of PEFT's.

>>> import mixtura
>>> mixtura.AdapterConfig(method="expert_lora", settings={"rank": 4}).peft_type.value
'MIXTURA'

``get_peft_model``, ``save_pretrained``, ``PeftModel.from_pretrained``, switching, merging and transformers'
Trainer take it like a type of PEFT's own once this package, or ``mixtura.AdapterConfig``, has been imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from mixtura.errors import UserError

if find_spec("peft") is None:
    raise UserError("adapters need PEFT; install mixtura[peft]")

from mixtura.adapting.config import AdapterConfig
from mixtura.adapting.library import start_from
from mixtura.adapting.steps import StepCallback
from mixtura.adapting.tuner import AdapterTuner, register

__all__ = ["AdapterConfig", "AdapterTuner", "StepCallback", "register", "start_from"]

register()
