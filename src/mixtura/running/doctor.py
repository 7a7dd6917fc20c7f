"""What a machine offers a model: versions, limits and rates, and what is in the way of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, final

import psutil
import torch
from packaging.requirements import Requirement

import mixtura
from mixtura.kernels.compiled import isas, num_threads, processors, why_missing
from mixtura.kernels.rates import memory_bytes_per_second
from mixtura.machine.control_groups import processor_quota
from mixtura.machine.disk import disk_bytes_per_second
from mixtura.machine.processor import processor_name
from mixtura.running.memory.available import available_bytes

_WATCHED = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "peft", "accelerate")


@final
@dataclass(frozen=True, slots=True)
class Health:
    """What a machine offers a model, each rate measured now.

    Attributes:
        versions: package to the version installed; packages that are not are left out.
        unsupported: package to the versions mixtura is made for, where what is installed is none of them.
        processor: its name.
        num_cores: cores of the machine.
        num_processors: those this process may use, by affinity and quotas.
        quota: processors' worth of time granted by control groups; None without a limit.
        num_threads: threads that the kernels run on.
        torch_threads: threads that PyTorch runs on.
        isas: instruction sets the compiled kernels can use, the best last; empty without compiled kernels.
        why_missing: why there are no compiled kernels; empty where there are.
        memory_num_bytes: memory of the machine.
        free_num_bytes: memory this process can still take, under the limits of control groups too.
        read_bytes_per_s: rate at which the kernels read memory.
        disk_bytes_per_s: rate of reading `disk_file` past what is held of it in memory.
        disk_file: the file that was read.
    """

    versions: Mapping[str, str]
    unsupported: Mapping[str, str]
    processor: str
    num_cores: int
    num_processors: int
    quota: float | None
    num_threads: int
    torch_threads: int
    isas: tuple[str, ...]
    why_missing: str
    memory_num_bytes: int
    free_num_bytes: int
    read_bytes_per_s: float
    disk_bytes_per_s: float
    disk_file: str

    def to_dict(self) -> dict[str, Any]:
        """The record as the JSON object that `mixtura doctor --json` prints."""
        return asdict(self)

    @property
    def advice(self) -> tuple[str, ...]:
        """What holds models back here, and what to do about it: a sentence each."""
        found = []
        if self.why_missing:
            found.append(
                f"the compiled kernels are missing ({self.why_missing}), so weights are read more slowly; "
                "install mixtura again where there is a C++ compiler"
            )
        for name, wanted in self.unsupported.items():
            found.append(
                f"{name} {self.versions[name]} is outside of {wanted}, which mixtura is made for; "
                f"install '{name}{wanted}'"
            )
        if self.num_threads < self.num_processors:
            found.append(
                f"{self.num_threads} of {self.num_processors} processors are used; "
                f"set OMP_NUM_THREADS={self.num_processors}, or unset it"
            )
        return tuple(found)


def examine(file: Path) -> Health:
    """Look at this machine, and measure what bounds a model on it: seconds.

    Args:
        file: a file to read from disk, of the model in question where there is one.
    """
    versions = installed_versions()
    return Health(
        versions=versions,
        unsupported=_unsupported(versions),
        processor=processor_name(),
        num_cores=os.cpu_count() or 1,
        num_processors=processors(),
        quota=processor_quota(),
        num_threads=num_threads(),
        torch_threads=torch.get_num_threads(),
        isas=isas(),
        why_missing=why_missing(),
        memory_num_bytes=int(psutil.virtual_memory().total),
        free_num_bytes=available_bytes(),
        read_bytes_per_s=memory_bytes_per_second(),
        disk_bytes_per_s=disk_bytes_per_second(file),
        disk_file=str(file),
    )


def installed_versions() -> dict[str, str]:
    """The versions that matter to a model: mixtura's, Python's and those of the packages it runs on."""
    found = {"mixtura": mixtura.__version__, "python": platform.python_version()}
    for name in _WATCHED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _unsupported(versions: Mapping[str, str]) -> dict[str, str]:
    """The ranges that mixtura's own requirements give and that the installed versions lie outside of."""
    try:
        wanted = [Requirement(line) for line in requires("mixtura") or ()]
    except PackageNotFoundError:  # Run from its sources without being installed.
        return {}
    ranges = {one.name.replace("-", "_"): one.specifier for one in wanted}
    return {
        name: str(ranges[name])
        for name, number in versions.items()
        if name in ranges and not ranges[name].contains(number, prereleases=True)
    }
