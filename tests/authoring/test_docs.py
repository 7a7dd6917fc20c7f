"""The generated pages are those the sources give."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixtura.authoring.docs import DOCS_DIR, main, pages, stale, write
from mixtura.methods import header, kinds, own_names


def test_no_page_is_stale() -> None:
    assert stale() == [], "write the pages again: python -m mixtura.authoring.docs"


def test_every_method_and_kind_has_a_page() -> None:
    expected = {"methods/README.md"}
    for kind in kinds():
        expected |= {f"methods/{kind.name}/README.md"}
        expected |= {f"methods/{kind.name}/{name}.md" for name in own_names(kind.name)}
    assert set(pages()) == expected


def test_a_page_says_what_the_file_says() -> None:
    page = pages()["methods/routers/switch.md"]
    found = header("routers", "switch")
    assert found.title in page
    assert "| `capacity_factor` | `float` | `1.25` |" in page
    assert "```python\n>>> import torch" in page
    for name in found.sections:
        assert not name or f"## {name}" in page


def test_links_lead_to_files() -> None:
    for name, text in pages().items():
        # What stands between fences is code, in which brackets mean something else.
        prose = "".join(text.split("```")[::2])
        for target in [part.split(")")[0] for part in prose.split("](")[1:]]:
            assert (DOCS_DIR / name).parent.joinpath(target).resolve().exists(), f"{name} links to {target}"


def test_stale_missing_and_left_over_pages_are_found_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(DOCS_DIR / "methods", docs / "methods")
    assert main(["--check", "--out", str(docs)]) == 0
    (docs / "methods/caches/lru.md").unlink()
    (docs / "methods/caches/gone.md").write_text("a method that was removed")
    with (docs / "methods/README.md").open("a") as file:
        file.write("by hand")
    wrong = ["methods/README.md", "methods/caches/gone.md", "methods/caches/lru.md"]
    assert stale(docs) == wrong
    assert main(["--check", "--out", str(docs)]) == 1
    said = capsys.readouterr().out
    assert all(name in said for name in wrong)
    assert write(docs) == wrong
    assert stale(docs) == []
    assert not (docs / "methods/caches/gone.md").exists()


def test_the_command_checks_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mixtura.authoring.docs", "--check", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "stale" in done.stdout
    assert "python -m mixtura.authoring.docs" in done.stderr
    assert not list(tmp_path.iterdir())
