"""Running models layer by layer from disk: the same numbers, and nothing left in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES as EVERY_FAMILY
from families import model_class, tiny_model
from tiny_plans import WIDTHS, mixed_widths, save_packed, save_source, uneven_drops, write
from torch import Tensor, nn

from mixtura import create, observe
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import masked, open_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import SettingError, UserError
from mixtura.kernels import ExpertTensors, using
from mixtura.running.loading import load
from mixtura.running.stream import Streamed

FAMILIES = (
    "qwen3_moe",
    "gpt_oss",
    pytest.param("mixtral", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
)
IDS = torch.arange(48).view(3, 16) + 5
MASK = (torch.arange(16) < torch.tensor([16, 9, 13])[:, None]).long()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert isinstance(logits, Tensor)
    return logits


def ran(streamed: Streamed, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits and places of a run, put together."""
    chunks: list[tuple[Tensor, Tensor]] = []

    def keep(logits: Tensor, places: Tensor) -> None:
        chunks.append((logits, places))

    streamed.run(IDS, MASK, on_logits=keep, **options)
    return torch.cat([logits for logits, _ in chunks]), torch.cat([places for _, places in chunks])


def resident(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not tensor.is_meta]


# Given a mask, transformers' qwen3_omni_moe asks its config for an id that it lacks.
OTHERS = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in EVERY_FAMILY
    if family not in ("qwen3_moe", "gpt_oss", "qwen3_omni_moe") and model_class(family).can_generate()
]


# One set of kernels: which of them run in memory, where linear layers have theirs, depends on the machine.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", *OTHERS])
def test_it_computes_what_the_model_in_memory_does(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    valid = MASK.bool()
    with using("torch"):
        streamed, expected = Streamed(open_checkpoint(source)), logits_of(load(source))
        torch.testing.assert_close(logits_of(streamed.model)[valid], expected[valid], rtol=1e-5, atol=1e-6)
        assert resident(streamed.model) == []
        logits, places = ran(streamed, logits_bytes=4 * 64 * 7)
    assert torch.equal(places, valid.flatten().nonzero().squeeze(1))
    torch.testing.assert_close(logits, expected[valid], rtol=1e-5, atol=1e-6)
    assert resident(streamed.model) == []


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4"])
def test_compiled_kernels_round_otherwise_and_no_more(family: str, mode: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    valid = MASK.bool()
    with using(mode):
        expected = logits_of(load(source))[valid]
        logits = logits_of(Streamed(open_checkpoint(source)).model)[valid]
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def test_batches_keep_their_bound_and_change_nothing(tmp_path: Path) -> None:
    streamed = Streamed(open_checkpoint(save_source(tmp_path / "source", "qwen3_moe")))
    row = 16 * streamed.bytes_per_token(16)
    sizes = [len(rows) for rows in streamed.batches(3, 16, max_bytes=2 * row)]
    assert sizes == [2, 1]
    assert [len(rows) for rows in streamed.batches(3, 16, max_bytes=1)] == [1, 1, 1]
    whole, places = ran(streamed)
    parts, same_places = ran(streamed, max_bytes=2 * row)
    assert torch.equal(places, same_places)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    states = streamed.hidden(IDS, MASK)
    torch.testing.assert_close(states, streamed.hidden(IDS, MASK, max_bytes=1), rtol=1e-5, atol=1e-6)
    with pytest.raises(SettingError, match="max_bytes"):
        streamed.hidden(IDS, max_bytes=0)


def test_only_wanted_logits_are_computed(tmp_path: Path) -> None:
    streamed = Streamed(open_checkpoint(save_source(tmp_path / "source", "qwen3_moe")))
    wanted = torch.zeros_like(MASK, dtype=torch.bool)
    wanted[0, 3] = wanted[2, 12] = True
    logits, places = ran(streamed, wanted=wanted)
    assert places.tolist() == [3, 2 * 16 + 12]
    torch.testing.assert_close(logits, logits_of(streamed.model)[wanted], rtol=1e-5, atol=1e-6)


def test_a_run_beside_makes_the_logits_of_given_states(tmp_path: Path) -> None:
    streamed = Streamed(open_checkpoint(save_source(tmp_path / "source", "granitemoe")))
    states = streamed.hidden(IDS, MASK)
    seen = 0

    def compare(logits: Tensor, beside: Tensor, places: Tensor) -> None:
        nonlocal seen
        torch.testing.assert_close(logits, beside, rtol=1e-5, atol=1e-6)
        seen += len(places)

    streamed.run_beside(IDS, MASK, beside=states, on_both=compare, logits_bytes=4 * 64 * 10)
    assert seen == int(MASK.sum())


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_a_change_outside_the_experts_can_be_tried_and_others_keep_the_head(
    family: str, tmp_path: Path
) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", family))
    plain = Streamed(view)
    expected = plain.model.__class__.from_pretrained(tmp_path / "source")
    asked = set()

    def half(name: str, tensor: Tensor) -> Tensor:
        asked.add(name)
        return tensor / 2 if tensor.ndim == 2 else tensor

    with torch.no_grad():
        changed = set()
        for name, parameter in expected.named_parameters():
            source = view.sources[name].names[0]
            if parameter.ndim == 2 and view.sources[name].converter is None:
                parameter.mul_(0.5)
                changed.add(source)
    states = plain.hidden(IDS, MASK)
    wanted, whole = logits_of(expected), logits_of(plain.model)

    def compare(logits: Tensor, beside: Tensor, places: Tensor) -> None:
        torch.testing.assert_close(logits, wanted.flatten(0, 1)[places], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beside, whole.flatten(0, 1)[places], rtol=1e-4, atol=1e-5)

    Streamed(view, changed=half).run_beside(IDS, MASK, beside=states, on_both=compare)
    assert changed <= asked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_can_be_tried_without_writing_it(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    view = open_checkpoint(source)
    transposed = view.layers[0].layout.transposed

    layers = {layer.index: layer for layer in view.layers}

    def round_trip(index: int, expert: int, dtype: torch.dtype) -> ExpertTensors | None:
        bits = WIDTHS[expert % len(WIDTHS)]
        if bits is None:
            return None
        tensors = layers[index].native_expert(expert)
        quantizer = create("quantizers", "round_to_nearest", bits=bits)

        def rounded(weight: Tensor) -> Tensor:
            turned = weight.T if transposed else weight
            decoded: Tensor = quantizer.decode(quantizer.encode(turned.contiguous()), weight.dtype)
            return decoded.T if transposed else decoded

        return tensors._replace(up=rounded(tensors.up), down=rounded(tensors.down)).to(dtype)

    tried = logits_of(Streamed(view, round_trip).model)
    written = write(source, tmp_path / "written", *mixed_widths(source))
    stored = logits_of(Streamed(open_checkpoint(written)).model)
    # The last bits of a product depend on where its operands lie in memory.
    torch.testing.assert_close(tried, stored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_experts_are_never_chosen(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    view, drops = open_checkpoint(source), uneven_drops(source)
    used: set[tuple[int, int]] = set()

    def note(index: int, expert: int, dtype: torch.dtype) -> None:
        used.add((index, expert))

    streamed = Streamed(view, note, dropped=drops)
    found = logits_of(streamed.model)
    assert used
    assert not used & {(layer, expert) for layer, experts in drops.items() for expert in experts}
    loaded = load(source)
    with masked(loaded, drops):
        expected = logits_of(loaded)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="layer 99"):
        Streamed(view, dropped={99: [0]})


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_observing_it_counts_what_observing_in_memory_does(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    view = open_checkpoint(source)
    tokens = TokenBatch(IDS, MASK, torch.tensor([0, 1, 0]), ("one", "other"))
    options = {"statistics": ("output_norm",), "progress": False, "keep_choices": True}
    streamed = observe(Streamed(view).model, tokens, layers=view.layers, **options)
    loaded = observe(load(source), tokens, **options)
    for one, other in zip(streamed.layers, loaded.layers, strict=True):
        assert one.index == other.index
        assert torch.equal(one.counts, other.counts)
        assert one.choices is not None
        assert torch.equal(one.choices, other.choices)
        torch.testing.assert_close(one.weight_sums, other.weight_sums, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            one.statistics["output_norm"], other.statistics["output_norm"], rtol=1e-4, atol=1e-5
        )


def test_an_error_leaves_nothing_in_memory(tmp_path: Path) -> None:
    def fail(index: int, expert: int, tensors: ExpertTensors) -> ExpertTensors:
        raise RuntimeError("no such luck")

    source = save_source(tmp_path / "source", "qwen3_moe")
    streamed = Streamed(open_checkpoint(source), fail)
    with pytest.raises(RuntimeError, match="luck"):
        logits_of(streamed.model)
    assert resident(streamed.model) == []


def test_a_packed_checkpoint_streams_too(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "gpt_oss")
    streamed = Streamed(open_checkpoint(packed))
    logits, _ = ran(streamed)
    torch.testing.assert_close(logits, logits_of(load(packed))[MASK.bool()], rtol=1e-5, atol=1e-6)


PEAK = """
import json, sys, torch
from mixtura.running.memory.process import peak_resident_bytes, resident_bytes, settle
settle()
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.running.stream import Streamed
streamed = Streamed(open_checkpoint(sys.argv[1]))
before = resident_bytes()
total = 0
def count(logits, places):
    global total
    total += len(places)
streamed.run(torch.arange(256).view(2, 128), on_logits=count, logits_bytes=1 << 20)
print(json.dumps({"grown": peak_resident_bytes() - before, "positions": total}))
"""


@pytest.mark.slow
def test_a_model_runs_in_a_fraction_of_its_size(tmp_path: Path) -> None:
    config = tiny_model("qwen3_moe").config
    config.update({"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 6})
    config.update({"num_experts": 64, "num_local_experts": 64, "vocab_size": 512})
    model = open_model(type(tiny_model("qwen3_moe"))(config)).model
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large")], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["positions"] == 256
    assert num_bytes > 500 << 20
    assert measured["grown"] < num_bytes / 8
