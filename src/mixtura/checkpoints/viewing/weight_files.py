"""Which files of a model hold its weights: one rule for a directory and for the hub, transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from mixtura.errors import CheckpointError, UnsupportedModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
# A key of config.json with which a model names its file of weights itself.
NAMED_KEY = "transformers_weights"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_ADVICE = (
    "{where} is a pickle, which can run code when it is read; use a safetensors checkpoint, or convert it "
    "with save_pretrained"
)
_POINTER_START = b"version https://git-lfs"
_NOT_CONTENT = 512


def first_file(is_there: Callable[[str], bool], config: Mapping[str, Any]) -> str | None:
    """The file that reading weights starts from: what the config names, one file, or the index of several.

    Args:
        is_there: whether the model has a file of this name.
        config: its ``config.json``.

    Returns:
        None where there is none of them.

    Raises:
        CheckpointError: the config names a file that is not there.
    """
    named = config.get(NAMED_KEY)
    if isinstance(named, str):
        if not (named.endswith((".safetensors", INDEX_SUFFIX)) and is_inside(named) and is_there(named)):
            raise CheckpointError(
                f"config.json names {named!r} under {NAMED_KEY}, which is no safetensors file of the model; "
                "finish the download or correct config.json"
            )
        return named
    return next((name for name in (SINGLE_FILE, INDEX_FILE) if is_there(name)), None)


def weight_map(index: Mapping[str, Any], where: object) -> dict[str, str]:
    """From an index, the file that each tensor is in.

    Raises:
        CheckpointError: it is no index, or names what lies outside the model.
    """
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{where} has no weight_map; download it again")
    for file in set(map(str, listed.values())):
        if not is_inside(file):
            raise CheckpointError(
                f"{where} names {file!r}, which is no file of this model; download it again"
            )
    return {str(name): str(file) for name, file in listed.items()}


def is_inside(name: str) -> bool:
    """Whether a relative name stays within the directory it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.name != ""


def without_weights(names: Collection[str], where: object) -> CheckpointError | UnsupportedModelError:
    """The error for a model with no file to start from, which says what is there instead."""
    found = sorted(name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS)
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name)
    if any("-of-" in name for name in found):
        return CheckpointError(
            f"{where} has parts of weights, such as {found[0]}, but no {INDEX_FILE} that says what is in "
            "them; finish the download"
        )
    if found:
        return UnsupportedModelError(
            f"{where} has weights in {', '.join(found[:3])} only, where transformers reads {SINGLE_FILE} or "
            f"{INDEX_FILE}; if they are a variant, rename them so, if they are in another library's format, "
            "use the checkpoint for transformers"
        )
    if pickles:
        return UnsupportedModelError(PICKLE_ADVICE.format(where=f"{where}/{pickles[0]}"))
    return CheckpointError(
        f"{where} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; finish the download"
    )


def stand_in(start: bytes) -> str | None:
    """What lies in a file's place, where its first bytes show that it is not the file that was meant.

    >>> stand_in(b"<!DOCTYPE html>")
    'is a web page that was saved in its place; download it again, logged in if that is asked for'
    >>> stand_in(b"{") is None
    True
    """
    head = start[:_NOT_CONTENT].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(_POINTER_START):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull' in its directory"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page that was saved in its place; download it again, logged in if that is asked for"
    return None
