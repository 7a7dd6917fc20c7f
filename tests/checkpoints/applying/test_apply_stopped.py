"""Applying a plan in processes that are killed, interrupted or run out of room, and going on after."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from applying_process import apply_interrupted, apply_mixed, apply_with_small_files_only, measure, mixed_plan
from applying_sources import MakeSource, add_side_files, folder_digest
from transformers import MixtralConfig, MixtralForCausalLM

from mixtura.checkpoints.apply import apply_plan
from mixtura.errors import OutputError
from mixtura.types import Plan

SHARD_BYTES = 500_000
# Processes are forked from one that has the slow imports behind it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mixtura.checkpoints.apply", "mixtura.methods.quantizers.round_to_nearest"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 12 MB Mixtral in several shards."""
    folder = tmp_path_factory.mktemp("larger") / "mixtral"
    config = MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_local_experts=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="5MB")
    add_side_files(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The digest of what an undisturbed process writes, and the seconds it takes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    first = CONTEXT.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    began = time.monotonic()
    process = start(source, out)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0
    return folder_digest(out), seconds


def start(source: Path, out: Path) -> BaseProcess:
    """A process that applies the plan; forked from one that has everything imported."""
    process = CONTEXT.Process(target=apply_mixed, args=(source, out, SHARD_BYTES))
    process.start()
    return process


def one_thread(action: Callable[[], Path]) -> Path:
    """Run with one thread for PyTorch, as the processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return action()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_it_ends_with_the_same_bytes(
    seed: int, source: Path, undisturbed: tuple[str, float], tmp_path: Path
) -> None:
    before = folder_digest(source)
    digest, seconds = undisturbed
    chance = random.Random(seed)
    out = tmp_path / "out"
    kept: list[int] = []
    for attempt in range(60):
        process = start(source, out)
        if not kept:
            # However fast the machine is at this moment, the first is killed on its way.
            wait_for(lambda: (tmp_path / "out.partial").exists())
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kept.append(len(list((tmp_path / "out.partial").glob("model/*.safetensors"))))
            continue
        # Later attempts have longer, so that the last shard is reached however slow the machine is.
        process.join(timeout=chance.uniform(0.2, 1.0) * seconds * (1 + attempt / 10))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if out.exists():
            break
        kept.append(len(list((tmp_path / "out.partial").glob("model/*.safetensors"))))
    assert folder_digest(out) == digest
    if (tmp_path / "out.partial").exists():
        # Killed after the move; the same call tidies up.
        one_thread(lambda: apply_plan(mixed_plan(source), source, out, shard_bytes=SHARD_BYTES))
    assert not (tmp_path / "out.partial").exists()
    assert folder_digest(source) == before
    assert kept == sorted(kept)
    assert kept


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on_and_does(
    source: Path, undisturbed: tuple[str, float], tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    queue = CONTEXT.Queue()
    process = CONTEXT.Process(target=apply_interrupted, args=(source, out, SHARD_BYTES, queue))
    process.start()
    wait_for(lambda: any(partial.glob("model/*.safetensors")))
    os.kill(process.pid or 0, signal.SIGINT)
    assert f"{partial} keeps the shards already written: the same command again" in queue.get(timeout=60)
    process.join()
    assert not out.exists()
    one_thread(lambda: apply_plan(mixed_plan(source), source, out, shard_bytes=SHARD_BYTES, progress=False))
    assert folder_digest(out) == undisturbed[0]


def wait_for(ready: Callable[[], bool]) -> None:
    """Return when something holds; fail if it does not within a minute."""
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out)
    wait_for(lambda: (tmp_path / "out.partial" / "journal.json").exists())
    os.kill(process.pid or 0, signal.SIGSTOP)
    settings = {"shard_bytes": SHARD_BYTES, "progress": False}
    try:
        with pytest.raises(OutputError, match="another process is writing"):
            one_thread(lambda: apply_plan(mixed_plan(source), source, out, **settings))  # type: ignore[arg-type]
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
def test_memory_is_bounded_by_an_expert_not_by_the_model(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_local_experts=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    queue = CONTEXT.Queue()
    process = CONTEXT.Process(target=measure, args=(tmp_path / "source", tmp_path / "out", queue))
    process.start()
    num_bytes, grown_bytes = queue.get(timeout=120)
    process.join()
    assert num_bytes > 170e6
    assert grown_bytes < 60e6


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_told_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    queue = CONTEXT.Queue()
    arguments = (source, tmp_path / "out", 500_000, queue)
    process = CONTEXT.Process(target=apply_with_small_files_only, args=arguments)
    process.start()
    told = queue.get(timeout=120)
    process.join()
    assert told.startswith("OutputError")
    assert "File too large" in told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes, or changes its size."""
    disk = tmp_path / "disk"

    def mount(num_bytes: int) -> Path:
        options = f"size={num_bytes},nr_inodes=0"
        if disk.exists():
            options = f"remount,{options}"
        disk.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
        if made.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {made.stderr.decode().strip()}")
        return disk

    yield mount
    subprocess.run(["umount", disk], check=False, capture_output=True)


def test_too_small_a_disk_is_refused_with_numbers(
    make_source: MakeSource, small_disk: Callable[[int], Path]
) -> None:
    source, disk = make_source("qwen3_moe"), small_disk(1 << 20)
    with pytest.raises(OutputError, match=r"has .* free and writing out needs .*; free .* there"):
        apply_plan(mixed_plan(source), source, disk / "out", progress=False)
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_what_is_finished(
    make_source: MakeSource, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", make_source("qwen3_moe"), source], check=True)
    # Small files take a page each, which nobody can know from their sizes.
    for number in range(300):
        (source / f"note_{number}.txt").write_text("x")
    disk = small_disk(1_300_000)
    plan, settings = mixed_plan(source), {"shard_bytes": 50_000, "progress": False}
    with pytest.raises(OutputError, match="No space left on device; make room"):
        apply_plan(plan, source, disk / "out", **settings)  # type: ignore[arg-type]
    assert not (disk / "out").exists()
    shards = {
        path: path.stat().st_mtime_ns for path in (disk / "out.partial" / "model").glob("*.safetensors")
    }
    assert len(shards) > 2
    small_disk(16 << 20)
    out = apply_plan(plan, source, disk / "out", **settings)  # type: ignore[arg-type]
    for path, written in shards.items():
        assert (out / path.name).stat().st_mtime_ns == written
    other = apply_plan(plan, source, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert folder_digest(out) == folder_digest(other)


def stopped(source: Path, out: Path) -> Path:
    """The partial directory of a process that was killed just after it began."""
    partial = out.with_name("out.partial")
    process = start(source, out)
    wait_for(lambda: (partial / "journal.json").exists())
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not out.exists()
    return partial


@pytest.mark.slow
def test_going_on_with_other_terms_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = stopped(source, out)
    plan = mixed_plan(source)
    journal = (partial / "journal.json").read_bytes()

    def apply(plan: Plan = plan, **settings: object) -> Path:
        given = {"shard_bytes": SHARD_BYTES, "progress": False, **settings}
        return apply_plan(plan, source, out, **given)  # type: ignore[arg-type]

    with pytest.raises(OutputError, match=r"shard_bytes \(500000 then, 2000000 now\); repeat"):
        one_thread(lambda: apply(shard_bytes=2_000_000))
    with pytest.raises(OutputError, match=r"the plan \("):
        one_thread(lambda: apply(Plan(plan.source_digest)))
    with pytest.raises(OutputError, match="the source's name"):
        one_thread(lambda: apply(source_name="another"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OutputError, match=r"the number of threads \(1 then, 2 now\)"):
            apply()
    finally:
        torch.set_num_threads(threads)
    assert (partial / "journal.json").read_bytes() == journal
    assert one_thread(apply) == out


@pytest.mark.slow
def test_stopped_between_the_move_and_the_tidying_it_is_finished(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = stopped(source, out)
    journal = (partial / "journal.json").read_bytes()
    plan = mixed_plan(source)

    def apply() -> Path:
        return apply_plan(plan, source, out, shard_bytes=SHARD_BYTES, progress=False)

    one_thread(apply)
    digest = folder_digest(out)
    partial.mkdir()
    (partial / "journal.json").write_bytes(journal)
    assert one_thread(apply) == out
    assert not partial.exists()
    assert folder_digest(out) == digest
    partial.mkdir()
    (partial / "lock").touch()
    with pytest.raises(OutputError, match="exists and is never overwritten"):
        one_thread(apply)
    assert not partial.exists()
    assert folder_digest(out) == digest


@pytest.mark.slow
def test_stopped_while_it_was_given_up_it_begins_anew(
    source: Path, undisturbed: tuple[str, float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.rmtree(stopped(source, out) / "model")
    one_thread(lambda: apply_plan(mixed_plan(source), source, out, shard_bytes=SHARD_BYTES, progress=False))
    assert folder_digest(out) == undisturbed[0]


@pytest.mark.slow
def test_a_finished_shard_that_was_changed_is_written_again(
    source: Path, undisturbed: tuple[str, float], tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(source, out)
    wait_for(lambda: len(list(partial.glob("model/*.safetensors"))) > 1)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    first, second, *_ = sorted(partial.glob("model/*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    with second.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"#")
    (partial / "model" / "config.json.unfinished").write_text("{")
    one_thread(lambda: apply_plan(mixed_plan(source), source, out, shard_bytes=SHARD_BYTES, progress=False))
    assert folder_digest(out) == undisturbed[0]
