"""A new method of any kind keeps its kind's contract from the start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mixtura.authoring.contracts import run
from mixtura.authoring.scaffold import new_method
from mixtura.errors import OutputError, UnknownNameError, UserError
from mixtura.methods import METHODS_DIR, PACKAGE_DIR, class_name, header, kinds

KINDS = [kind.name for kind in kinds()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_method_passes(tmp_path: Path, kind: str) -> None:
    written = new_method(kind, "my_own_2", tmp_path)
    assert written == (tmp_path / "my_own_2.py",)
    assert header(kind, str(written[0])).title == "MyOwn2"
    assert [outcome for outcome in run(kind, str(written[0]), quick=True) if not outcome.ok] == []


def test_there_is_a_template_for_each_kind_and_no_other() -> None:
    templates = {path.stem for path in (PACKAGE_DIR / "authoring" / "scaffold" / "templates").glob("*.txt")}
    assert templates == {*KINDS, "test"}


def test_by_default_it_goes_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_method("cache", "mine") == (tmp_path / "mine.py",)


@pytest.mark.parametrize("where", [".", "docs", "src/mixtura/methods/caches"])
def test_in_a_checkout_it_goes_to_its_kind_with_a_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "src/mixtura/methods/caches").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(METHODS_DIR / "__init__.py", tmp_path / "src/mixtura/methods")
    monkeypatch.chdir(tmp_path / where)
    method, test = new_method("cache", "mine")
    assert method == tmp_path / "src/mixtura/methods/caches/mine.py"
    assert test == tmp_path / "tests/methods/caches/test_cache_mine.py"
    compile(test.read_text(), str(test), "exec")


@pytest.mark.parametrize(
    "name", ["", "My", "my-own", "_own", "own_", "a__b", "2nd", "class", "ö", "a/b", "a.b"]
)
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a method; write it in snake_case"):
        new_method("router", name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is a router named 'top_k' already"):
        new_method("router", "top_k", tmp_path)
    assert new_method("cache", "top_k", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("mine")
    with pytest.raises(OutputError, match="is there already and is left as it is"):
        new_method("cache", "mine", tmp_path)
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'routers'"):
        new_method("ruter", "mine", tmp_path)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="give --out another"):
        new_method("cache", "mine", tmp_path / "file")
    if os.geteuid() == 0:
        with pytest.raises(OutputError, match="cannot be written"):
            new_method("cache", "mine", Path("/proc/nowhere"))


@pytest.mark.parametrize("kind", KINDS)
def test_class_names_are_the_names_in_camel_case(tmp_path: Path, kind: str) -> None:
    text = new_method(kind, "quite_new", tmp_path)[0].read_text()
    assert f"class {class_name('quite_new')}(" in text
