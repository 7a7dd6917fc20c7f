"""What processes really take, beside what was accounted for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from families import model_class, tiny_config
from tiny_checkpoints import tiny_tokenizer
from tiny_plans import mixed_widths, write

from mixtura.errors import SettingError, UserError
from mixtura.running.memory import account, measure_generating, runtime_bytes

MIB = 1 << 20
# Above this measured and accounted agree by share, below it by size.
LARGE = 256 * MIB


def save_middling(path: Path, family: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
    """A model of a family with random weights, large enough to be seen in resident memory."""
    config = tiny_config(family)
    config.update({"max_position_embeddings": 4096, "vocab_size": 4096, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(family)._from_config(config, dtype=dtype).save_pretrained(path)
    return path


@cache
def bare(kernels: str | None) -> int:
    """What a process takes without a model; measured once for each choice of kernels."""
    assert kernels == os.environ.get("MIXTURA_KERNELS")
    return runtime_bytes()


def taken(path: Path, context: int) -> int:
    """What generating with the model adds to a bare process."""
    return measure_generating(path, context, 8).peak_bytes - bare(os.environ.get("MIXTURA_KERNELS"))


def assert_agree(path: Path, context: int) -> None:
    measured = taken(path, context)
    if measured <= LARGE:
        # As for the bare runtime: of a process that reads files anew, fewer pages become resident.
        measured = max(measured, taken(path, context))
    accounted = account(path, context).total_bytes
    margin = 0.05 * measured if measured > LARGE else 16 * MIB
    assert abs(accounted - measured) < margin, f"{accounted / MIB:.1f} for {measured / MIB:.1f} MiB"


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels, which the account is for: whether compiled ones run, and for how many tokens,
    depends on the machine."""
    monkeypatch.setenv("MIXTURA_KERNELS", "torch")


@pytest.mark.slow
def test_compiled_kernels_take_no_more_than_was_accounted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    source = save_middling(tmp_path / "source", "mixtral", **sizes)
    path = write(source, tmp_path / "packed", *mixed_widths(source))
    assert taken(path, 1024) < account(path, 1024).total_bytes + 16 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("torch_kernels")
def test_small_models_take_what_was_accounted(tmp_path: Path) -> None:
    path = save_middling(tmp_path / "small", "qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    assert_agree(path, 512)
    assert_agree(path, 2048)
    tiny_tokenizer().save_pretrained(path)
    assert_agree(path, 512)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packed_models_take_what_was_accounted(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    source = save_middling(tmp_path / "source", family, **sizes)
    assert_agree(write(source, tmp_path / "packed", *mixed_widths(source)), 1024)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_kernels")
def test_large_models_take_what_was_accounted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 6}
    path = save_middling(tmp_path / "large", "qwen3_moe", **sizes)
    assert account(path, 2048).weights_bytes > LARGE
    assert_agree(path, 2048)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_kernels")
def test_float32_takes_what_was_accounted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    assert_agree(save_middling(tmp_path / "model", "qwen3_moe", torch.float32, **sizes), 1024)


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="num_new_tokens"):
        measure_generating(tmp_path, 8, 8)
    with pytest.raises(UserError, match=r"process of its own failed: .*config\.json"):
        measure_generating(tmp_path, 8, 4)


@pytest.mark.slow
def test_the_account_is_no_less_than_generating_takes(tmp_path: Path) -> None:
    """Of 16 bits with the kernels there are, as a fit measures its models: pages of libraries count too."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 6}
    path = save_middling(tmp_path / "model", "qwen3_moe", **sizes)
    tiny_tokenizer().save_pretrained(path)
    peak = measure_generating(path, 512, 32).peak_bytes
    assert peak <= account(path, 512).total_bytes + runtime_bytes()


COUNTED = """
import json
from mixtura.running.memory.process import peak_resident_bytes, resident_bytes, settle
settle()
import torch
before = resident_bytes()
held = torch.ones(64 << 20, dtype=torch.uint8)
during = resident_bytes()
del held
print(json.dumps([before, during, resident_bytes(), peak_resident_bytes()]))
"""


def test_a_settled_process_waits_without_spinning() -> None:
    """OpenMP says itself how its threads wait, when it is loaded."""
    code = "from mixtura.running.memory.process import settle; settle(); import torch; torch.ones(8).sum()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "TRUE"

    def policy(own: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | own
        )
        return next(line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line).upper()

    assert "PASSIVE" in policy({})
    assert "ACTIVE" in policy({"OMP_WAIT_POLICY": "ACTIVE"})


@pytest.mark.slow
def test_a_settled_process_gives_back_what_it_frees() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    before, during, after, peak = json.loads(done.stdout)
    assert during - before >= 64 * MIB
    assert after - before < 2 * MIB
    assert peak >= during - 2 * MIB  # the kernel notes peaks a few pages late


COMPILED = """
import json
from mixtura.running.memory.process import KERNEL_CACHE_BYTES, resident_bytes, settle
settle()
import torch
weight, rows = torch.ones(256, 256, dtype=torch.bfloat16), torch.ones(400, 256, dtype=torch.bfloat16)
rows @ weight
before = resident_bytes()
for count in range(2, 401):
    rows[:count] @ weight
print(json.dumps([resident_bytes() - before, KERNEL_CACHE_BYTES]))
"""


@pytest.mark.slow
def test_compiled_kernels_are_kept_for_a_few_shapes_only() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    grown, bound = json.loads(done.stdout)
    assert grown < bound + 8 * MIB  # kept for every shape, the kernels would take some 240 MiB
