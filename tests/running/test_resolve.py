"""MODEL arguments: directories, hub ids with and without the hub, consent, what cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mixtura.errors import CheckpointError
from mixtura.running.resolve import HubId, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-moe"
FILES = {
    "config.json": b'{"model_type": "olmoe"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 3000,
    "model-00002-of-00002.safetensors": b"b" * 2000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "LICENSE": b"free",
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"c" * 9000,
    "modeling_own.py": b"raise SystemExit",
    "original/other.safetensors": b"d" * 9000,
}
WANTED = {
    "config.json",
    "tokenizer.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "LICENSE",
}


@dataclass
class Hub:
    """A hub with one model, on this machine; it remembers which files were fetched."""

    url: str = ""
    fetched: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))

    def answer(self, path: str, method: str) -> tuple[int, dict[str, str], bytes]:
        if path.startswith(f"/api/models/{REPO}"):
            rest = path.removeprefix(f"/api/models/{REPO}")
            if rest.startswith("/revision/") and not rest.startswith(
                ("/revision/main", f"/revision/{COMMIT}")
            ):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if rest.startswith("/tree/"):
                return 200, {}, json.dumps([self._entry(name) for name in self.files]).encode()
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return 200, {}, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if method == "GET":
            self.fetched.append(name)
        data = self.files[name]
        tag = hashlib.sha1(data).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, data

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send("GET")

        def do_HEAD(self) -> None:
            self._send("HEAD")

        def _send(self, method: str) -> None:
            status, headers, body = served.answer(self.path.partition("?")[0], method)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if method == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()


def run_resolve(
    model: str,
    home: Path,
    hub_url: str,
    *,
    yes: bool = False,
    answer: bool | None = None,
    offline: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Resolve in a process of its own: huggingface_hub reads its environment when it is imported."""
    ask = "None" if answer is None else f"lambda q: (print('asked:', q), {answer})[1]"
    code = (
        "from mixtura.errors import UserError\n"
        "from mixtura.running.resolve import resolve_model\n"
        "try:\n"
        f"    found = resolve_model({model!r}, assume_yes={yes}, ask={ask})\n"
        "    print('path:', found.path, 'name:', found.name)\n"
        "except UserError as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub_url,
        "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
    }
    env.pop("HF_HUB_OFFLINE", None)
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def path_in(output: str) -> Path:
    return Path(output.split("path: ")[1].split(" name:")[0])


def test_hub_ids_are_told_from_paths() -> None:
    assert HubId.parse("owner/name@v1.0") == HubId("owner/name", "v1.0")
    assert HubId.parse("owner/name@refs/pr/3") == HubId("owner/name", "refs/pr/3")
    assert HubId.parse("gpt2") == HubId("gpt2")
    for text in ("/abs/path", "./here", "../up", "~/home", "a/b/c", "owner/name@", ""):
        assert HubId.parse(text) is None, text


def test_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    found = resolve_model(str(tmp_path))
    assert found.path == tmp_path
    assert found.name == tmp_path.name


def test_missing_path_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no directory .*/none; give a directory"):
        resolve_model(str(tmp_path / "none"))


def test_download_fetches_what_belongs_to_the_model_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    result = run_resolve(REPO, tmp_path, hub.url, yes=True)
    path = path_in(result.stdout)
    assert {p.name for p in path.iterdir()} == WANTED
    assert (path / "model-00001-of-00002.safetensors").read_bytes() == FILES[
        "model-00001-of-00002.safetensors"
    ]
    assert set(hub.fetched) == WANTED
    assert f"name: {REPO}" in result.stdout


def test_it_asks_with_the_size_and_takes_no_for_an_answer(hub: Hub, tmp_path: Path) -> None:
    result = run_resolve(REPO, tmp_path, hub.url, answer=False)
    assert f"asked: Download {REPO}, 4.9 KiB, to {tmp_path}/hub?" in result.stdout, result.stderr
    assert "UserError: someone/tiny-moe was not downloaded, as asked" in result.stdout
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_without_a_terminal_nothing_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    result = run_resolve(REPO, tmp_path, hub.url)
    assert "give --yes to download" in result.stdout, result.stderr
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_what_is_cached_is_not_fetched_again_and_works_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    first = run_resolve(REPO, tmp_path, hub.url, yes=True)
    fetched = len(hub.fetched)
    again = run_resolve(f"{REPO}@main", tmp_path, hub.url)
    assert path_in(again.stdout) == path_in(first.stdout), again.stderr
    assert len(hub.fetched) == fetched
    switched_off = run_resolve(REPO, tmp_path, hub.url, offline=True)
    assert path_in(switched_off.stdout) == path_in(first.stdout), switched_off.stderr
    unreachable = run_resolve(f"{REPO}@{COMMIT}", tmp_path, "http://127.0.0.1:9")
    assert path_in(unreachable.stdout) == path_in(first.stdout), unreachable.stderr


def test_unknown_ids_and_revisions_are_named(hub: Hub, tmp_path: Path) -> None:
    unknown = run_resolve("someone/else", tmp_path, hub.url, yes=True)
    assert (
        "CheckpointError: there is neither a directory nor a model on the hub named someone/else"
        in unknown.stdout
    )
    revision = run_resolve(f"{REPO}@v9", tmp_path, hub.url, yes=True)
    assert "has no revision 'v9'" in revision.stdout, revision.stderr


def test_offline_without_a_copy_says_so(tmp_path: Path) -> None:
    result = run_resolve(REPO, tmp_path, "http://127.0.0.1:9", offline=True)
    assert "CheckpointError: there is no directory someone/tiny-moe, the hub is switched off" in result.stdout
    result = run_resolve(REPO, tmp_path, "http://127.0.0.1:9")
    assert "the hub cannot be reached" in result.stdout, result.stderr


def test_pickle_only_models_are_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "pytorch_model.bin")}
    result = run_resolve(REPO, tmp_path, hub.url, yes=True)
    assert "UnsupportedModelError: someone/tiny-moe on the hub has no complete safetensors" in result.stdout
    assert hub.fetched == []


def test_one_file_of_weights_goes_before_an_index(hub: Hub, tmp_path: Path) -> None:
    hub.files = {**FILES, "model.safetensors": b"w" * 500}
    path = path_in(run_resolve(REPO, tmp_path, hub.url, yes=True).stdout)
    assert {p.name for p in path.glob("*.safetensors")} == {"model.safetensors"}


def test_weights_that_a_config_names_itself_are_fetched(hub: Hub, tmp_path: Path) -> None:
    config = json.dumps({"model_type": "olmoe", "transformers_weights": "consolidated.safetensors"})
    hub.files = {**FILES, "config.json": config.encode()}
    path = path_in(run_resolve(REPO, tmp_path, hub.url, yes=True).stdout)
    assert {p.name for p in path.glob("*.safetensors")} == {"consolidated.safetensors"}


def test_what_goes_with_a_note_beside_the_weights_is_fetched(hub: Hub, tmp_path: Path) -> None:
    beside = ("adapter_model.safetensors", "router.safetensors", "additional_chat_templates/rag.jinja")
    hub.files = {
        **FILES,
        **dict.fromkeys(("adapter_config.json", "router.json"), b"{}"),
        **dict.fromkeys(beside, b"t"),
    }
    path = path_in(run_resolve(REPO, tmp_path, hub.url, yes=True).stdout)
    assert all((path / name).is_file() for name in beside)


def test_other_weights_on_the_hub_are_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "consolidated.safetensors")}
    result = run_resolve(REPO, tmp_path, hub.url, yes=True)
    assert "has weights in consolidated.safetensors only" in result.stdout, result.stderr
    assert "consolidated.safetensors" not in hub.fetched


@pytest.mark.parametrize(("repo", "name"), [("me--Tiny-MoE", "me/Tiny-MoE@0123456"), ("gpt", "gpt@0123456")])
def test_a_snapshot_of_the_cache_has_the_name_of_its_model(repo: str, name: str, tmp_path: Path) -> None:
    snapshot = tmp_path / f"models--{repo}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert resolve_model(str(snapshot)).name == name
    (tmp_path / "link").symlink_to(snapshot)
    assert resolve_model(str(tmp_path / "link")).name == name
