"""Finding methods by file, by path and through entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtura import methods as method
from mixtura.authoring.contracts import run
from mixtura.authoring.scaffold import new_method
from mixtura.errors import SettingError, UnknownNameError, UserError

HEADER = 'METHOD = {"paper": 7, "title": "A title"}\n'
CLASS = 'class MyRouter:\n    """Does it."""\n'


@pytest.fixture
def router_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "my_router.py"
        path.write_text(text)
        return str(path)

    return write


def test_kinds_are_the_folders_that_say_so() -> None:
    found = {kind.name: kind.singular for kind in method.kinds()}
    assert found == {
        "adapters": "adapter",
        "aggregators": "aggregator",
        "allocators": "allocator",
        "analyses": "analysis",
        "attentions": "attention",
        "balancers": "balancer",
        "caches": "cache",
        "data_mixers": "data_mixer",
        "decoders": "decoder",
        "ensembles": "ensemble",
        "estimators": "estimator",
        "exchanges": "exchange",
        "experts": "expert",
        "forms": "form",
        "mergers": "merger",
        "mixers": "mixer",
        "model_routers": "model_router",
        "placements": "placement",
        "prefetchers": "prefetcher",
        "pruners": "pruner",
        "quantizers": "quantizer",
        "routers": "router",
        "sparsifiers": "sparsifier",
        "statistics": "statistic",
        "trimmers": "trimmer",
        "upcyclers": "upcycler",
    }
    assert method.kind("analysis") == method.kind("analyses")


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'routers'"):
        method.kind("ruters")
    with pytest.raises(UnknownNameError, match="no router named 'topk'; did you mean 'top_k'"):
        method.header("routers", "topk")
    with pytest.raises(UnknownNameError, match="no method named 'reep'; did you mean 'reap'"):
        method.locate("reep")


def test_shared_files_are_no_methods() -> None:
    assert "_shared" not in method.names("routers")
    with pytest.raises(UnknownNameError):
        method.header("routers", "_shared")


def test_header_is_read_from_the_text() -> None:
    found = method.header("router", "switch")
    assert found.paper == 132
    assert found.summary.startswith("Send each token")
    assert [(s.name, s.type, s.default) for s in found.settings] == [
        ("capacity_factor", "float", "1.25"),
        ("jitter", "float", "0.01"),
        ("seed", "int", "0"),
    ]
    wanted = ["", "Shapes", "Raises", "Example", "Differences from the paper", "Reference"]
    assert list(found.sections) == wanted


def test_listing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mixtura, mixtura.methods as m\n"
        "headers = [m.header(k.name, n).to_dict() for k in m.kinds() for n in m.names(k.name)]\n"
        "assert len(headers) >= 13\n"
        "bad = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_locate_across_kinds(tmp_path: Path, third_party: Callable[..., None]) -> None:
    assert method.locate("reap").kind == "pruners"
    third_party("caches", "reap")
    with pytest.raises(UserError, match="a method named 'reap'; write caches/reap or pruners/reap"):
        method.locate("reap")
    assert method.locate("cache/reap").kind == "caches"


def test_a_file_outside_is_loaded_by_path(tmp_path: Path) -> None:
    (path,) = new_method("router", "my_router", tmp_path)
    cls = method.load_method("routers", str(path))
    assert cls.__name__ == "MyRouter"
    assert method.header("routers", str(path)).path == path


def test_a_path_into_the_package_is_the_packages_method() -> None:
    path = method.header("routers", "top_k").path
    assert method.load_method("routers", str(path)) is method.load_method("routers", "top_k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CLASS, "needs a literal METHOD"),
        ('METHOD = {"paper": 7}\n' + CLASS, "needs a literal METHOD"),
        ('METHOD = {"paper": 7, "title": "x", "more": 1}\n' + CLASS, "needs a literal METHOD"),
        ('METHOD = {"paper": "7", "title": "x"}\n' + CLASS, "'paper' of METHOD"),
        ('METHOD = {"paper": 7, "title": "x", "tags": "one"}\n' + CLASS, "'tags' of METHOD"),
        ("METHOD = dict(paper=7)\n" + CLASS, "must be a literal"),
        (HEADER, "must define the class MyRouter"),
        (HEADER + "def broken(:\n", "is not a Python file"),
        (HEADER + CLASS, "derived from mixtura.methods.routers.Router"),
        (HEADER + "import no_such_module_anywhere\n" + CLASS, "importing .* failed: ModuleNotFoundError"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong(router_file: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.load_method("routers", router_file(text))


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"there is no file nowhere\.py"):
        method.header("routers", "nowhere.py")


def test_create_refuses_unknown_and_mistyped_settings() -> None:
    with pytest.raises(SettingError, match="RoundToNearest has no setting 'bit'; did you mean 'bits'"):
        method.create("quantizers", "round_to_nearest", bit=4)
    with pytest.raises(SettingError, match="bits of RoundToNearest must be int, got '4'"):
        method.create("quantizers", "round_to_nearest", bits="4")
    with pytest.raises(SettingError, match="bits of RoundToNearest must be int, got True"):
        method.create("quantizers", "round_to_nearest", bits=True)


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a distribution that offers one method: ``third_party(kind, name, module=...)``."""
    made = 0

    def install(kind: str, name: str, *, module: str | None = None) -> None:
        nonlocal made
        made += 1
        site = tmp_path / f"site{made}"
        package = f"their_package{made}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        target = module or f"{package}.{name}"
        (info / "entry_points.txt").write_text(f"[mixtura.{kind}]\n{name} = {target}\n")
        (site / package).mkdir()
        (site / package / "__init__.py").touch()
        written = new_method(kind, f"{name}_of_theirs", site / package)[0]
        old, new = method.class_name(written.stem), method.class_name(name)
        (site / package / f"{name}.py").write_text(written.read_text().replace(old, new))
        monkeypatch.syspath_prepend(str(site))
        method._entry_points.cache_clear()

    yield install
    method._entry_points.cache_clear()
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]


def test_entry_points_are_listed_loaded_and_checked(third_party: Callable[..., None]) -> None:
    third_party("pruners", "by_weight")
    assert "by_weight" in method.names("pruners")
    assert "by_weight" not in method.own_names("pruners")
    found = method.header("pruners", "by_weight")
    assert (found.name, found.title) == ("by_weight", "ByWeight")
    assert "their_package1" not in sys.modules, "listing must not import another package"
    assert method.create("pruners", "by_weight").plan is not None
    assert [outcome for outcome in run("pruners", "by_weight") if not outcome.ok] == []


def test_entry_points_that_clash_with_ours(third_party: Callable[..., None]) -> None:
    third_party("pruners", "reap")
    with pytest.raises(UserError, match="two pruners are named 'reap'"):
        method.names("pruners")
    assert method.names("caches")


def test_entry_points_that_clash_with_each_other(third_party: Callable[..., None]) -> None:
    third_party("caches", "clock")
    third_party("caches", "clock")
    with pytest.raises(UserError, match="two caches are named 'clock'"):
        method.header("caches", "clock")


def test_an_entry_point_must_be_a_module_of_its_name(third_party: Callable[..., None]) -> None:
    third_party("caches", "clock", module="their_package1.other")
    with pytest.raises(UserError, match=r"entry point 'clock' of .* must be a module of that name"):
        method.names("caches")


def test_an_entry_point_without_its_module(third_party: Callable[..., None]) -> None:
    third_party("caches", "clock", module="gone_package.clock")
    with pytest.raises(UserError, match=r"there is no module gone_package\.clock"):
        method.header("caches", "clock")


def test_headers_are_json() -> None:
    headers = [method.header(k.name, n).to_dict() for k in method.kinds() for n in method.names(k.name)]
    assert json.loads(json.dumps(headers)) == headers
    assert {"kind", "name", "paper", "title", "summary"} <= set(headers[0])
