"""`mixtura doctor` and `generate -v`: the path of each layer, with the reason where it is not the fastest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mixtura.cli.doctor import path_lines
from mixtura.data import specimen
from mixtura.kernels.paths import PATHS, LayerPath

MODEL = str(specimen.path())


def test_layers_that_are_alike_share_a_line() -> None:
    paths = [
        LayerPath("model.layers.0", "PyTorch", "it is in training"),
        *(LayerPath(f"model.layers.{number}", "whole step", "") for number in (1, 2, 3)),
    ]
    assert path_lines(paths) == [
        "model.layers.0: PyTorch, as it is in training",
        "model.layers.1 to 3: whole step",
    ]


def test_doctor_tells_the_machine_and_the_layers(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("doctor", MODEL, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["machine"]["read_bytes_per_s"] > 0
    assert [layer["layer"] for layer in told["layers"]] == [f"model.layers.{number}" for number in range(6)]
    assert all(layer["path"] in PATHS for layer in told["layers"])


def test_what_is_no_model_is_said_in_a_sentence(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, said = run("doctor", tmp_path)
    assert (code, out) == (2, "")
    assert said.startswith(f"error: {tmp_path} is not a model: it has no config.json")


def test_generate_says_which_way_it_went(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = run("generate", "1 + 1 =", "--max-new-tokens", "3", "-v")
    assert code == 0
    assert said.splitlines()[-1].startswith("model.layers.0 to 5: ")


def test_doctor_forecasts_for_another_machine(run: Callable[..., tuple[int, str, str]]) -> None:
    given = ("--memory", "8GiB", "--context", "64", "--disk", "2GB", "--ram", "20GB")
    code, out, _ = run("doctor", MODEL, *given)
    assert code == 0
    assert "2.00 GB/s of disk, 20.0 GB/s of memory" in out
    assert out.splitlines()[-1].startswith("all experts fit")


def test_rates_without_memory_are_refused(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, said = run("doctor", MODEL, "--disk", "2GB")
    assert (code, out) == (2, "")
    assert said.startswith("error: --disk and --ram are for a forecast; give --memory, too")
