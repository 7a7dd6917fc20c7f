"""What is wrong with a training or a contest ends in one sentence and exit code 2; nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from train.train_runs import finish, start, write_config

from mixtura.cli import main


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command line says; fails unless it refuses in one sentence."""
    monkeypatch.setattr(sys, "argv", ["mixtura", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert "Traceback" not in said.err
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # Methods and their settings.
        ("router.top_kk=3", "NoisyTopK has no setting 'top_kk'; did you mean 'top_k'?"),
        ("router.top_k=99", "top_k of NoisyTopK must be in [1, 4], got 99"),
        ("router.top_k=two", "top_k of NoisyTopK must be int, got 'two'"),
        ("router={name: top_q}", "no router named 'top_q'; did you mean"),
        ("router={top_k: 2}", "a router is written as a name or as a mapping with a name"),
        ("mixer=smeer", "no mixer named 'smeer'; did you mean 'smear'?"),
        ("balancers=[loss_fre]", "no balancer named 'loss_fre'; did you mean 'loss_free'"),
        ("balancers=[{name: loss_free, speed: 1}]", "LossFree has no setting 'speed'"),
        ("balancers=3", "a balancer is written as a name"),
        ("router=pro_moe", "ProMoe cannot route without labels named 'conditional', got domain"),
        # Capacity.
        ("capacity=0", "factor of Capacity must be in [1e-06, 1000000], got 0"),
        ("capacity={factor: x}", "factor of capacity must be a number, got 'x'"),
        ("capacity={factor: 1, order: wait}", "order of capacity must be 'arrival', 'weight', got 'wait'"),
        ("capacity={factor: 1, ordr: weight}", "capacity has no setting 'ordr'; did you mean 'order'?"),
        # Sizes.
        ("moe.num_experts=0", "num_experts of an MoE layer must be in"),
        ("moe.num_experts=many", "num_experts of an MoE layer must be a whole number"),
        ("moe=3", "moe of model must hold keys and values, got 3"),
        ("layers=dense", "layers of model must be a list with one entry a layer, got 'dense'"),
        ("layers=[dense]", "layers must have one entry for each of 2 layers, got 1"),
        ("hidden_size=0", "hidden_size of model must be in [1"),
        ("hidden_size=big", "hidden_size of model must be a whole number, got 'big'"),
        ("num_attention_heads=0", "num_attention_heads of model must be in [1"),
        ("num_key_value_heads=0", "num_key_value_heads of model must be in [1"),
        ("head_dim=7", "head_dim must be even"),
        ("attention_dropout=5", "attention_dropout of model must be in [0, 1], got 5"),
        ("rms_norm_eps=x", "rms_norm_eps of model must be a number, got 'x'"),
        ("tie_word_embeddings=perhaps", "tie_word_embeddings of model must be true or false"),
        ("rope_parameters=5", "rope_parameters of model must hold keys and values"),
        ("rope_parameters={rope_type: linea}", "no rope_type named 'linea'; did you mean 'linear'"),
        ("vocab_size=5", "the tokenizer has 4096 tokens, but vocab_size is 5"),
        ("max_position_embeddings=3", "sequence_length is 32, but max_position_embeddings is 3"),
        ("moe.pool=3", "a pool of 3 layers does not divide 2 MoE layers"),
        ("model=3", "model of the configuration must be of type dict"),
        # Text.
        ("sequence_length=0", "sequence_length of data must be in [2"),
        ("sequence_length=100000", "too few for sequences of 100000"),
        ("data.domains=code", "domains of data must be of type list[str], got 'code'"),
        ("data.domains=[code, proze]", "no domain named 'proze'; did you mean 'prose'?"),
        ("text=missing.txt", "no text at missing.txt"),
        ("tokenizer=nowhere", "there is no directory nowhere"),
        # Steps.
        ("seed=-5", "seed of the configuration must be in [0"),
        ("seed=hello", "seed of the configuration must be of type int"),
        ("learning_rate=.nan", "learning_rate of training must be in"),
        ("training=[]", "training must hold keys and values"),
        ("num_stepz=3", "no key 'num_stepz'; did you mean 'num_steps'"),
        ("=3", "a setting is written key=value, got '=3'"),
    ],
)
def test_a_change_that_cannot_be(
    change: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    config = str(write_config(tmp_path))
    assert says in refused(capsys, monkeypatch, "train", config, "--set", change, "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "at least 200 characters"),
        (b"a b c", "at least 200 are needed"),
        (b"\xff\xfe\x80" * 99, "is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_trained_on(
    content: bytes,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    out, config = tmp_path / "run", str(write_config(tmp_path))
    changes = ("--set", f"text={tmp_path / 'bad.txt'}")
    assert says in refused(capsys, monkeypatch, "train", config, *changes, "--out", str(out))
    assert not out.exists()


def test_a_place_that_cannot_be_trained_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(tmp_path))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    for place, says in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "model", "holds something else than a training"),
        (Path("/proc/nowhere/run"), "cannot write /proc/nowhere/run"),
    ):
        assert says in refused(capsys, monkeypatch, "train", config, "--out", str(place))
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert "cannot read" in refused(capsys, monkeypatch, "train", str(tmp_path / "none.yaml"))
    assert "cannot read" in refused(capsys, monkeypatch, "train", str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\x00\xff")
    assert "is not YAML" in refused(capsys, monkeypatch, "train", str(tmp_path / "bytes.yaml"))


def test_a_training_is_gone_on_with_as_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, num_steps=1, warmup_steps=0, decay_steps=0)
    out = str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["mixtura", "train", str(config), "--out", out, "--json"])
    main_ends_well(main)
    capsys.readouterr()
    other = refused(capsys, monkeypatch, "train", str(config), "--out", out, "--set", "router=top_k")
    assert "has another model.moe.router" in other
    text = tmp_path / "text/lines.txt"
    text.write_text(text.read_text().replace("line 7 ", "line 8 "))
    assert "began with other text" in refused(capsys, monkeypatch, "train", str(config), "--out", out)


def main_ends_well(command: object) -> None:
    """Run the command line, which exits with 0."""
    assert callable(command)
    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("routers", "--only", "top_pp"), "no entry in the arena named 'top_pp'; did you mean 'top_p'"),
        (
            ("router",),
            "no kind in the arena named 'router'; did you mean 'routers' or 'model_routers' or 'pruners'?",
        ),
        (("routers", "--tokens", "5"), "tokens of the arena must be at least"),
    ],
)
def test_a_contest_that_cannot_be_held(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    assert says in refused(capsys, monkeypatch, "arena", *arguments, *places)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("arena", "routers", "--seeds", "0"), ("train", "x.yaml", "--threads", "0")]
)
def test_a_number_out_of_range(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixtura", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Input should be greater than or equal to 1" in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_process_itself_exits_with_two_and_one_line(tmp_path: Path) -> None:
    changes = ("--set", "router.top_k=99", "--out", str(tmp_path / "run"))
    code, out, err = finish(start(str(write_config(tmp_path)), *changes, fresh=True))
    assert code == 2
    assert not out
    assert err.strip() == "error: top_k of NoisyTopK must be in [1, 4], got 99"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_metrics_for_tensorboard_where_asked_for(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = str(write_config(tmp_path, num_steps=4, decay_steps=1))
    for asked in ("false", "true"):
        changes = ("--set", f"tensorboard={asked}", "--out", str(tmp_path / asked))
        code, _, err = finish(start(config, *changes))
        assert code == 0, err
    assert not (tmp_path / "false/tensorboard").exists()
    assert not (tmp_path / "false/runs").exists()
    events = EventAccumulator(str(tmp_path / "true/tensorboard"))
    events.Reload()
    known = set(events.Tags()["scalars"])
    wanted = {
        f"train/layer_{n}/{what}" for n in (0, 1) for what in ("entropy", "dead", "dropped", "logit_norm")
    }
    assert {"train/loss"} | wanted <= known
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
