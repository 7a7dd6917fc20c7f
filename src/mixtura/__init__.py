"""mixtura: Mixture-of-Experts models from end to end, on one core.

Importing the package is cheap: PyTorch and transformers are imported when something that needs
them is first used.

>>> import mixtura
>>> mixtura.names("trimmers")
('contribution', 'heapr', 'random')
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use (PEP 562).
_PUBLIC = {
    "MixturaError": "mixtura.errors",
    "UserError": "mixtura.errors",
    "header": "mixtura.methods",
    "kinds": "mixtura.methods",
    "names": "mixtura.methods",
    "load_method": "mixtura.methods",
    "create": "mixtura.methods",
    "Budget": "mixtura.types",
    "LayerShape": "mixtura.types",
    "Plan": "mixtura.types",
    "Routing": "mixtura.types",
    "Trace": "mixtura.types.trace",
    "open_model": "mixtura.checkpoints.view",
    "observe": "mixtura.running.observing",
    "analyze": "mixtura.running.observing.analyzing",
    "apply_plan": "mixtura.checkpoints.apply",
    "load": "mixtura.running.loading",
    "load_tokenizer": "mixtura.checkpoints.tokenizer",
    "set_bits": "mixtura.checkpoints.stores",
    "MixturaConfig": "mixtura.modeling.family",
    "MixturaForCausalLM": "mixtura.modeling.family",
    "export": "mixtura.modeling.family",
    "export_gguf": "mixtura.running.gguf",
    "export_compressed_tensors": "mixtura.fitting.compressing.ordinary",
    "decode": "mixtura.running.decoders.entry",
    "fit": "mixtura.fitting",
    "compress": "mixtura.fitting.compressing",
    "upcycle": "mixtura.fitting.upcycling",
    "compose": "mixtura.fitting.upcycling",
    "condense": "mixtura.checkpoints.upcycling.back",
    "parallelize": "mixtura.running.parallel.entry",
    "register_backend": "mixtura.kernels",
    "AdapterConfig": "mixtura.adapting",
    "export_lora": "mixtura.adapting.exporting",
    "tune": "mixtura.train.tuning",
    "Runner": "mixtura.running.composing.asking",
    "fit_model_router": "mixtura.running.composing.fitted",
    "load_model_router": "mixtura.running.composing.fitted",
    "read_table": "mixtura.running.composing.reading",
    "set_router": "mixtura.rerouting",
    "load_router": "mixtura.rerouting",
    "balance": "mixtura.rerouting",
    "record_routing": "mixtura.rerouting",
    "replay_routing": "mixtura.rerouting",
    "restore": "mixtura.rerouting",
    "estimators": "mixtura.methods.estimators",
    "specimen": "mixtura.data.specimen",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mixtura' has no attribute {name!r}")
    home = import_module(_PUBLIC[name])
    # A part that is a module by itself.
    return home if home.__name__.endswith(f".{name}") else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
