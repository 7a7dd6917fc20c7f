"""Reading parameters of a model from the files of a checkpoint, in the dtype that it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.checkpoints.viewing.formats import Decoder, StoredTensor
from mixtura.checkpoints.viewing.headers import TensorFiles
from mixtura.checkpoints.viewing.mapping import ShapeModel, Source
from mixtura.checkpoints.viewing.meta import named_tensors
from mixtura.checkpoints.viewing.opening import OpenedFiles
from mixtura.checkpoints.viewing.quantization import check_readable, fp8_block, stated_format

# What a model can compute in: PyTorch lets no narrower dtype be the default of a model's tensors.
_COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@final
class CheckpointReader:
    """Reads parameters of a model from wherever a checkpoint keeps them."""

    def __init__(
        self,
        decoder: Decoder,
        stored: Mapping[str, StoredTensor],
        sources: Mapping[str, Source],
        shapes: Mapping[str, tuple[int, ...]],
        config: Any,
    ) -> None:
        self.decoder = decoder
        self.stored = stored
        self.sources = sources
        self._shapes = shapes
        self._config = config

    def parameter(self, name: str) -> Tensor:
        """One whole parameter under the model's own name. Raises `LookupError` for a name it has not."""
        source = self.source(name)
        tensors = {
            pattern: [self.decoder.read(self.stored[part]) for part in parts]
            for pattern, parts in source.parts.items()
        }
        return source.convert(tensors, ShapeModel(self._shapes.__getitem__), self._config)[name]

    def expert_slice(self, name: str, expert: int, num_experts: int) -> Tensor:
        """Entry ``expert`` of a parameter that stacks experts, reading nothing of the others."""
        source = self.source(name)
        tensors = {
            pattern: [
                self.decoder.read(self.stored[part], None if "*" in pattern else slice(expert, expert + 1))
                for part in parts
            ]
            for pattern, parts in source.expert_names(expert, num_experts).items()
        }
        one = ShapeModel(lambda parameter: (1, *self._shapes[parameter][1:]))
        return source.convert(tensors, one, self._config)[name][0]

    def source(self, name: str) -> Source:
        """Where a parameter comes from. Raises `LookupError` for a name the model has not."""
        try:
            return self.sources[name]
        except KeyError:
            raise LookupError(f"the checkpoint has nothing for {name!r}") from None


def make_reader(
    opened: OpenedFiles,
    meta: nn.Module,
    stored: Mapping[str, StoredTensor],
    sources: Mapping[str, Source],
    files: TensorFiles,
) -> tuple[dict[str, tuple[int, ...]], CheckpointReader]:
    """The shapes of a model's tensors, and what reads them; the config is given a dtype if it has none.

    Raises `CheckpointError` or `UnsupportedModelError` where one that is needed cannot be decoded.
    """
    if stated_dtype(opened.config) is None:
        opened.config.dtype = inferred_dtype(stored, files, opened.stated_dtype)
    decoder = Decoder(files, compute_dtype(opened.config), fp8_block(opened.raw_config))
    tensors = named_tensors(meta)
    floating = {name: tensor.is_floating_point() for name, tensor in tensors.items()}
    check_readable(decoder, sources, stored, floating, stated_format(opened.path, opened.raw_config))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, CheckpointReader(decoder, stored, sources, shapes, opened.config)


def compute_dtype(config: Any) -> torch.dtype:
    """What a view's model computes in and scaled formats are decoded to."""
    dtype = stated_dtype(config)
    assert dtype is not None, "a view gives its config the dtype of the weights where the file names none"
    return dtype


def stated_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a config names; `None` where it names none that a model could compute in."""
    for owner in (config, config.get_text_config()):
        if isinstance(owner.dtype, torch.dtype) and owner.dtype in _COMPUTED:
            return owner.dtype
    return None


def inferred_dtype(
    stored: Mapping[str, StoredTensor], files: TensorFiles, named: str | None = None
) -> torch.dtype:
    """The dtype of a checkpoint whose config names none, by transformers' rule.

    That is what the index of the files names, else that of the first floating-point tensor, by name, of the
    first file. Scales do not count; bfloat16 where all else is in a scaled format.
    """
    by_index = next(
        (dtype for dtype in _COMPUTED if str(dtype).endswith(f".{named}") or str(dtype) == named), None
    )
    if by_index is not None:
        return by_index
    plain = (
        (files.entries[part].file, part)
        for tensor in stored.values()
        if len(tensor.parts) == 1
        for part in tensor.parts
    )
    order = sorted(plain)
    dtypes = (files.entries[name].dtype for _, name in order)
    return next((dtype for dtype in dtypes if dtype in _COMPUTED), torch.bfloat16)
