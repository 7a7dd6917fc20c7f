"""The small files beside the weights that go along: tokenizer, generation config, licence and more."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mixtura.checkpoints.applying.shards import flush_to_disk

# What is written anew.
_REPLACED = {"config.json", "plan.json", "experts.json", "measured.json", "report.html"}
# What tells of the source's weights: how they were trained, what they scored, their other formats, checksums.
_OF_THE_SOURCE = re.compile(
    r"(card|params|metrics|scores|training\w*|train_config|trainer_state|adapter_config|router"
    r"|\w*_results|eval\w*|recipe\w*)\.(jsonl?|ya?ml|csv|tsv|txt|md)"
    r"|(sha\d*|md5)-?sums?(\.txt)?|config\.json\..+|events\.out\..+|.+\.(log|sha256|sha512|md5|sig|asc)"
)
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz",
    ".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".tflite", ".ot", ".zip", ".tar", ".gz",
}  # fmt: skip
# transformers keeps further chat templates in a folder of this name.
_FOLDERS = ("additional_chat_templates",)
_LARGEST_BYTES = 64 << 20
_PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def side_files(source: Path) -> tuple[Path, ...]:
    """Files of a checkpoint directory that go along unchanged, relative to it, by name.

    Left out: weights in any format, pickles (whatever they are called), hidden files, the model card
    (a new one is written), what tells of the source's weights and is not true of the result (their training,
    evaluations, checksums) and files of more than 64 MiB that are not a tokenizer's.
    """
    found = [path for path in source.iterdir() if path.is_file() and _goes_along(path)]
    for folder in _FOLDERS:
        if (source / folder).is_dir():
            found += [path for path in (source / folder).iterdir() if path.is_file() and _goes_along(path)]
    return tuple(sorted(path.relative_to(source) for path in found))


def copy_side_files(source: Path, names: tuple[Path, ...], target: Path) -> None:
    """Copy files, links followed, and wait until they are on the disk."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        with (source / name).open("rb") as reader, (target / name).open("wb") as writer:
            shutil.copyfileobj(reader, writer)
            flush_to_disk(writer)


def _goes_along(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith((".", "readme")) or name in _REPLACED or name.endswith(".index.json"):
        return False
    if _OF_THE_SOURCE.fullmatch(name):
        return False
    if path.suffix.lower() in _WEIGHT_SUFFIXES:
        return False
    if path.stat().st_size > _LARGEST_BYTES and not name.startswith("tokenizer"):
        return False
    with path.open("rb") as stream:
        return not stream.read(2).startswith(_PICKLE_STARTS)
