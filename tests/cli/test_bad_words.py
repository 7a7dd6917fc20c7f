"""Wrong arguments of every command: one sentence or the usage, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

from mixtura.running.decoding import DRAWING

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("words") / "tiny")


@pytest.fixture
def place(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a model and things that are none."""
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "words.yaml").write_text("just words")
    (tmp_path / "train.yaml").write_text("seed: 0\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 200)
    (tmp_path / "none.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = [
    # Models.
    ("inspect nowhere/", "there is no directory nowhere/"),
    ("inspect file", "file is a file; give the directory"),
    ("inspect empty", "empty is not a model: it has no config.json"),
    ("observe file", "file is a file; give the directory"),
    ("generate file words", "file is a file; give the directory"),
    ("generate empty words", "empty is not a model: it has no config.json"),
    ("generate model", "model is a directory; give the text to continue"),
    # Prompts and how to go on from them.
    ("generate model -", "the prompt is empty"),
    ("generate model a --chat", "tokenizer has no chat template; leave out --chat"),
    ("generate model a --max-new-tokens 64", "more than the 64 positions"),
    ("generate model a --max-new-tokens 99999999999999999999", "must be in [1, 1073741824]"),
    ("generate model a --temperature 1e300", "temperature of generate must be in [0, 100]"),
    ("generate model a --temperature inf", "temperature of generate must be in [0, 100]"),
    ("generate model a --seed 99999999999999999999", "seed of generate must be in [0, 9223372036854775807]"),
    ("generate model a --bits 4", "write it with the quantizer nested"),
    # Text.
    ("observe model --text nowhere", "no text at nowhere; give a file or directory"),
    ("observe model --text empty", "the directory empty holds no files"),
    ("observe model --text bytes.txt", "bytes.txt is not UTF-8 text (byte 0)"),
    ("observe model --text none.txt", "none.txt is empty; at least 200"),
    ("observe model --text file", "file holds 4 characters of text; at least 200"),
    ("observe model --text /dev/zero", "/dev/zero is a device"),
    (f"observe model --text {'x' * 300}", "File name too long; give a path"),
    # Places.
    ("observe model --save empty", "empty is a directory; give the name of a file"),
    ("observe model --report no/page.html", "there is no directory no to write page.html to"),
    ("observe model --report file/page.html", "there is no directory file to write page.html to"),
    ("train train.yaml --out file/run", "cannot write file/run: "),
    ("train train.yaml --out file", "file is a file; give a directory to train in"),
    ("arena routers --out file/x", "cannot write file/x: "),
    ("arena routers --runs file", "cannot write file: file is a file"),
    ("new router mine --out file", "file is not a folder"),
    # Names.
    ("observe model --statistics output_nrom", "did you mean 'output_norm'"),
    ("methods rooters", "did you mean 'routers'"),
    ("show top-k", "did you mean 'top_k'"),
    ("show rooter/top_k", "did you mean 'routers'"),
    ("show random", "kinds have a method named 'random'; write"),
    ("show /", "no kind of method named ''"),
    ("new rooter mine", "did you mean 'routers'"),
    ("new router Bad-Name", "is no name for a method"),
    ("check router top_kk", "did you mean 'top_k'"),
    ("check router nowhere.py", "there is no file nowhere.py"),
    ("arena rooters", "did you mean 'routers'"),
    ("arena routers --only ,", "--only takes names with commas between"),
    ("arena routers --only top_pp", "did you mean 'top_p'"),
    # Configurations.
    ("train nowhere.yaml", "cannot read nowhere.yaml: No such file or directory"),
    ("train empty", "cannot read empty: Is a directory"),
    ("train words.yaml", "words.yaml must hold keys and values at its top, got a str"),
    ("train bytes.txt", "bytes.txt is not YAML: it is not UTF-8 text (byte 0)"),
    ("train empty.yaml --set num_stepz=3", "did you mean 'num_steps'"),
    ("train empty.yaml --set bf16=on", "must be of type bool, got 'on'; write true or false"),
    ("train empty.yaml --set num_steps=-1", "num_steps of training must be in [1, "),
    ("train empty.yaml --set text=bytes.txt", "bytes.txt is not UTF-8 text (byte 0)"),
    ("arena routers --model words.yaml", "words.yaml must hold keys and values"),
    ("arena routers --model nowhere.yaml", "cannot read nowhere.yaml"),
]


@pytest.mark.parametrize(("command", "says"), REFUSED, ids=[command[:60] for command, _ in REFUSED])
def test_a_refusal_is_one_sentence(
    command: str, says: str, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(place.rglob("*"))
    monkeypatch.setattr("sys.stdin", (place / "none.txt").open())
    code, out, err = run(*command.split(" "))
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "Usage: mixtura"),
        ("inspekt", "No such command 'inspekt'"),
        ("inspect --jason", "No such option: --jason"),
        ("inspect a b", "unexpected extra argument"),
        ("generate", "Missing argument"),
        ("generate a --temperature -1", "greater than or equal to 0"),
        ("generate a --temperature nan", "greater than or equal to 0"),
        ("generate a --temperature warm", "valid number"),
        ("generate a --seed -1", "greater than or equal to 0"),
        ("generate a --max-new-tokens 0", "greater than or equal to 1"),
        ("generate a --bits four", "valid integer"),
        ("observe --tokens -5", "greater than or equal to 2"),
        ("observe --length 1", "greater than or equal to 2"),
        ("show", "Missing argument"),
        ("new router", "Missing argument"),
        ("check router", "Missing argument"),
        ("train", "give a YAML file to train, or --recipe NAME"),
        ("arena routers --seeds 0", "greater than or equal to 1"),
        ("arena routers --tokens many", "valid integer"),
    ],
)
def test_wrong_usage_says_what_is_wrong(command: str, says: str, run: Run, place: Path) -> None:
    code, out, err = run(*command.split())
    assert code == 2
    assert says in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize("temperature", ["0", "0.7"])
@pytest.mark.parametrize(
    "entries",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"stop_strings": ["x"]},
        {"return_dict_in_generate": True},
        {"guidance_scale": 2.0, "repetition_penalty": 1.8, "no_repeat_ngram_size": 1},
    ],
    ids=lambda entries: "-".join(entries),
)
def test_generate_lives_with_what_models_are_configured_for(
    entries: dict[str, object], temperature: str, run: Run, place: Path
) -> None:
    (place / "model/generation_config.json").write_text(json.dumps(entries))
    asked = ("generate", "model", "hello", "--max-new-tokens", "4", "--temperature", temperature, "--json")
    code, out, err = run(*asked)
    assert code == 0, err
    assert 1 <= json.loads(out)["num_new_tokens"] <= 4


def test_generate_names_an_entry_that_cannot_be(run: Run, place: Path) -> None:
    assert "top_p" in DRAWING
    broken = "cannot read model/generation_config.json"
    for content, says in (('{"top_p": 5}', "top_p in the model's"), ("{broken", broken)):
        (place / "model/generation_config.json").write_text(content)
        code, out, err = run("generate", "model", "a", "--max-new-tokens", "4", "--temperature", "0.7")
        assert (code, out) == (2, "")
        assert says in err


def test_a_warning_is_a_sentence(run: Run, place: Path) -> None:
    folder = place / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "picture.png").write_bytes(b"\x89PNG\xff" * 50)
    code, out, err = run("observe", "model", "--text", folder, "--tokens", "64", "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 64
    assert f"warning: left out of {folder}, as no UTF-8 text: picture.png\n" in err
