"""What mixtura cannot open, and the sentence that says why and what to do instead."""

from __future__ import annotations

from typing import NoReturn

from mixtura.errors import UnsupportedModelError

OUTSIDE_CONTRACT = {
    "llama4": "its experts run as one dense batch over every token",
    "llama4_text": "its experts run as one dense batch over every token",
    "dbrx": "its experts lie in flat matrices of their own layout",
    "jetmoe": "its experts are parallel linear layers inside attention and MLP",
    "switch_transformers": "its experts are separate modules with a capacity limit",
    "nllb-moe": "its experts are separate modules with a capacity limit",
    "nllb_moe": "its experts are separate modules with a capacity limit",
    "longcat_flash": "some of its experts are identities without weights",
    "step3p7": "its experts do not follow the common experts contract",
    "vitpose_backbone": "its experts are chosen by data set, not by a router",
    "doge": "its experts are rows of product-key embeddings",
}

QUANTIZED_ELSEWHERE = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "quanto": "quanto",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "higgs": "HIGGS",
    "torchao": "torchao",
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "modelopt": "ModelOpt",
    "bitnet": "BitNet",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "quark": "Quark",
    "fp_quant": "FP-Quant",
}

READABLE_FORMATS = "bfloat16, float16, float32, block-scaled FP8 and MXFP4"


def refuse_without_experts(model_type: str) -> NoReturn:
    """Raise `UnsupportedModelError` for a model in which no experts of the common contract were found."""
    reason = OUTSIDE_CONTRACT.get(model_type)
    if reason is not None:
        raise UnsupportedModelError(
            f"{model_type} models are not supported: {reason}; docs/families.md lists the families that are"
        )
    raise UnsupportedModelError(
        f"this {model_type!r} model is dense: it has no Mixture-of-Experts layers; "
        "give a MoE model (docs/families.md lists the families)"
    )


def refuse_quantized(method: str, detail: str | None = None) -> NoReturn:
    """Raise `UnsupportedModelError` for weights quantised in a way that is not read here.

    ``detail`` is what the method itself calls the format.
    """
    name = QUANTIZED_ELSEWHERE.get(method, method) + (f" ({detail})" if detail else "")
    raise UnsupportedModelError(
        f"the weights are quantised with {name}, which mixtura does not read; "
        f"use the original checkpoint ({READABLE_FORMATS} are read)"
    )
