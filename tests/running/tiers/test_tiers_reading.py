"""Reading ranges of files past the page cache: the right bytes, and clear words where there are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_plans import save_source
from torch import Tensor

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import CheckpointError
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight
from mixtura.running.loading import load
from mixtura.running.tiers.files import digest_of
from mixtura.running.tiers.loads import Load
from mixtura.running.tiers.opening import Wish, tiers_of
from mixtura.running.tiers.reading import CHUNK_BYTES, LATER, Range, Reader

SIZE = 2 * CHUNK_BYTES + 12345


class Wrong(Prefetcher):
    """Guesses experts of the layer that has just run, which its next token may or may not need."""

    def guess(self, sight: Sight) -> list[Key]:
        return [Key(sight.layer, (expert + 3) % 8) for expert in sight.experts]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("read") / "bytes"
    content = torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return path, content


def room(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("priority", [0, LATER])
@pytest.mark.parametrize(
    ("offset", "num_bytes"),
    [(0, 1), (4095, 2), (1, 4096), (8192, 4096), (17, CHUNK_BYTES + 1), (0, SIZE), (SIZE - 3, 3)],
)
def test_any_range(file: tuple[Path, bytes], offset: int, num_bytes: int, priority: int) -> None:
    path, content = file
    target = room(num_bytes)
    load = Reader(2).read([Range(path, offset, target)], priority)
    load.wait()
    assert load.num_bytes == num_bytes
    assert target.numpy().tobytes() == content[offset : offset + num_bytes]


def test_neighbours_and_strangers_in_any_order(file: tuple[Path, bytes]) -> None:
    path, content = file
    places = [(900_000, 70), (100, 50), (150, 30), (2_000_000, 2_000_000), (181, 9), (99, 1)]
    targets = [room(num_bytes) for _, num_bytes in places]
    reader = Reader(3)
    load = reader.read([Range(path, o, t) for (o, _), t in zip(places, targets, strict=True)], LATER)
    reader.hurry(load)
    load.wait()
    for (offset, num_bytes), target in zip(places, targets, strict=True):
        assert target.numpy().tobytes() == content[offset : offset + num_bytes]


def test_nothing_is_there_at_once() -> None:
    load = Reader(1).read([])
    assert load.is_done
    load.wait()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    load = Reader(1).read([Range(tmp_path / "gone", 0, room(4))])
    with pytest.raises(CheckpointError, match="gone: No such file"):
        load.wait()


def test_a_file_that_ends_early_is_named(file: tuple[Path, bytes]) -> None:
    path, _ = file
    load = Reader(1).read([Range(path, SIZE - 10, room(20))])
    with pytest.raises(CheckpointError, match=f"ended at byte {SIZE}"):
        load.wait()


def test_a_read_that_fails_is_named_and_others_go_on(file: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = file
    reader = Reader(2)
    # A directory can be opened like a file, and not be read.
    bad, target = reader.read([Range(tmp_path, 0, room(4))]), room(4)
    with pytest.raises(CheckpointError, match="must stay where they are"):
        bad.wait()
    reader.read([Range(path, 7, target)]).wait()
    assert target.numpy().tobytes() == content[7:11]


def test_a_disk_that_does_not_answer_is_given_up(file: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = file
    pipe, target = tmp_path / "pipe", room(4)
    # Opening a pipe waits for somebody to write to it, as a disk that hangs lets readers wait.
    os.mkfifo(pipe)
    reader = Reader(2, patience_s=0.2)
    stalled = reader.read([Range(pipe, 0, room(4))])
    with pytest.raises(CheckpointError, match=r"an expert of 4 bytes for 0\.2 s"):
        stalled.wait()
    # The other thread reads on.
    reader.read([Range(path, 7, target)]).wait()
    assert target.numpy().tobytes() == content[7:11]
    with pipe.open("wb"):
        pass


def test_what_is_given_up_is_not_written(file: tuple[Path, bytes]) -> None:
    load = Load(4)
    load.begin(1)
    with load.writing() as is_wanted:
        assert is_wanted
    load.give_up(CheckpointError("enough"))
    with load.writing() as is_wanted:
        assert not is_wanted
    load.finish(None)
    with pytest.raises(CheckpointError, match="enough"):
        load.wait()


def test_digests_tell_any_word_and_the_order_of_blocks() -> None:
    values = np.random.default_rng(0).integers(0, 256, 5 * 4096 + 100, dtype=np.uint8)
    before, seen = digest_of(values), set()
    for place in (0, 4095, 4096, 12345, 5 * 4096, len(values) - 1):
        other = values.copy()
        other[place] ^= 1
        seen.add(digest_of(other))
    swapped = values.copy()
    swapped[:4096], swapped[4096:8192] = values[4096:8192], values[:4096]
    seen.add(digest_of(swapped))
    assert len(seen) == 7
    assert before not in seen


def test_a_shard_that_changes_or_goes_while_the_model_runs(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    model, ids = load(source, memory=Wish(pool_slots=2)), torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        shard = source / "model.safetensors"
        entry = open_checkpoint(source).entries["model.layers.0.mlp.experts.0.down_proj.weight"]
        with shard.open("r+b") as opened:
            opened.seek(entry.offset + 5)
            (value,) = opened.read(1)
            opened.seek(entry.offset + 5)
            opened.write(bytes([value ^ 1]))
        with pytest.raises(CheckpointError, match="is not what it was"):
            model(input_ids=ids)
        with shard.open("r+b") as opened:
            opened.seek(entry.offset + 5)
            opened.write(bytes([value]))
        assert torch.equal(model(input_ids=ids).logits, expected)
        # What was opened stays, whatever takes its place.
        shard.unlink()
        shard.write_bytes(b"another")
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_shard_that_is_cut_while_the_model_runs(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    model, ids = load(source, memory=Wish(pool_slots=2)), torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        shard = source / "model.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes(whole[: len(whole) // 8])
        with pytest.raises(CheckpointError, match="load the model again"):
            model(input_ids=ids)
        # The same file again: nothing of what was not read is taken for read.
        shard.write_bytes(whole)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_prefetcher_that_is_mostly_wrong_is_asked_no_more(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    model = load(source, memory=Wish(pool_slots=8, prefetch="next_gate"))
    tiers = tiers_of(model)
    assert tiers is not None
    assert tiers.ahead is not None
    tiers.ahead.prefetcher = Wrong()
    with torch.no_grad():
        for token in range(3, 60):
            model(input_ids=torch.tensor([[token]]))
    seen = tiers.statistics
    assert tiers.ahead.is_off
    assert seen.prefetched_bytes > 0
    assert seen.wasted_bytes > seen.used_bytes
    # What was guessed was needed, had to go, or is still there.
    left = sum(pool.num_ahead * pool.num_bytes for pool in tiers.pools)
    assert 0 <= seen.prefetched_bytes - seen.used_bytes - seen.wasted_bytes <= left
