"""What lies beside a checkpoint's weights and changes what its model computes: adapters and other routers."""

from __future__ import annotations

from pathlib import Path

from mixtura.checkpoints.viewing.opening import read_json
from mixtura.checkpoints.viewing.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mixtura.errors import CheckpointError, UnsupportedModelError

_ROUTERS = "router.json"


def adapter_of(path: Path) -> str | None:
    """The kind of adapter in a model's directory, such as ``LORA``; `None` where there is none.

    Raises:
        CheckpointError: there is one whose weights are missing.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(path / ADAPTER_CONFIG, "download it again")
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; finish the download, or delete the first "
            "if the model is to run without its adapter"
        )
    return str(config.get("peft_type", "an unnamed kind"))


def require_alone(path: Path, what: str) -> None:
    """Refuse a model that is more than its checkpoint says, where only the checkpoint would be heeded.

    Args:
        path: the model's directory.
        what: what is about to be done, as the sentence is to call it.

    Raises:
        UnsupportedModelError: an adapter or other routers lie beside its weights.
    """
    kind = adapter_of(path)
    if kind is not None:
        raise UnsupportedModelError(
            f"{path} holds an adapter ({kind}, {ADAPTER_CONFIG}) that changes what the model computes, and "
            f"{what} would be without it; merge it (merge_and_unload of PEFT, then save_pretrained) and give "
            f"the result, or give a copy without {ADAPTER_CONFIG} for the model alone"
        )
    if (path / _ROUTERS).is_file():
        raise UnsupportedModelError(
            f"{path} was saved with other routers or balancers than its family's ({_ROUTERS}), and {what} "
            f"would be with its family's; give a copy without {_ROUTERS} if that is meant"
        )
