"""From what a user types as MODEL to a local directory: a path, a hub id, or the specimen.

Nothing is downloaded without the user's consent, weights only as safetensors, and where the hub
cannot be reached what its cache holds is used.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.viewing.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX_SUFFIX,
    first_file,
    weight_map,
    without_weights,
)
from mixtura.errors import CheckpointError, OutputError, UnsupportedModelError, UserError
from mixtura.report.units import format_bytes

# What belongs to a model beside its weights: configs, tokenizers, templates, licence, card. Code does not.
_SIDE_FILES = re.compile(
    r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja|"
    r"(LICENSE|NOTICE|README|USE_POLICY)[^/]*",
    re.IGNORECASE,
)
# Weights that are not the model's own: what an adapter adds to it, and the routers that were set in it.
_BESIDE = {ADAPTER_CONFIG: ADAPTER_WEIGHTS, "router.json": "router.safetensors"}
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
# Room left on the disk beyond the download, for the file system and everyone else.
_SPARE_BYTES = 256 << 20

Ask = Callable[[str], bool]

_SPECIMEN = "specimen"


@final
@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the hub: ``owner/name``, and the branch, tag or commit if one was given.

    >>> HubId.parse("allenai/OLMoE-1B-7B-0924@main")
    HubId(repo='allenai/OLMoE-1B-7B-0924', revision='main')
    >>> HubId.parse("./models/mine") is None
    True
    """

    repo: str
    revision: str | None = None

    @staticmethod
    def parse(text: str) -> HubId | None:
        """The hub id a text is, or `None` if it can only be a path."""
        match = _HUB_ID.fullmatch(text)
        return HubId(match["repo"], match["revision"]) if match else None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@final
@dataclass(frozen=True, slots=True)
class Resolved:
    """A model on this machine: its directory, and the name the user knows it by."""

    path: Path
    name: str


def ask_on_terminal(question: str) -> bool:
    """Ask a yes-or-no question on standard error; Enter alone means no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def resolve_model(model: str | None, *, assume_yes: bool = False, ask: Ask | None = None) -> Resolved:
    """The local directory of a model; of the specimen for None, and for its name where no directory has it.

    Args:
        model: a directory, or a hub id such as ``owner/name`` or ``owner/name@revision``.
        assume_yes: download what is not on this machine without asking.
        ask: puts a question that names the size before a download; by default the terminal, if
            someone sits there.

    Raises:
        CheckpointError: there is neither such a directory nor such a model on the hub or in its cache.
        UnsupportedModelError: the model on the hub has no safetensors weights.
        UserError: a download is needed and was not agreed to.
        OutputError: the disk has no room for the download.
    """
    path = None if model is None else Path(model).expanduser()
    if model is None or path is None or (model == _SPECIMEN and not path.exists()):
        from mixtura.data import specimen

        return Resolved(specimen.path(), _SPECIMEN)
    if path.exists():
        from mixtura.checkpoints.applying.card import name_of_source

        return Resolved(path, name_of_source(path))
    hub_id = HubId.parse(model)
    if hub_id is None:
        raise CheckpointError(
            f"there is no directory {model}; give a directory with config.json and safetensors files, "
            f"a hub id such as owner/name, or nothing for the specimen"
        )
    if assume_yes:
        return Resolved(_from_hub(hub_id, lambda question: True), str(hub_id))
    if ask is None and sys.stdin.isatty():
        ask = ask_on_terminal
    return Resolved(_from_hub(hub_id, ask), str(hub_id))


def _from_hub(hub_id: HubId, ask: Ask | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _cached(hub_id, "the hub is switched off (HF_HUB_OFFLINE=1)")
    try:
        info = _model_info(hub_id)
    except ConnectionError as error:
        return _cached(hub_id, str(error))
    fetched = _files_of(hub_id, info)
    missing = {name: size for name, size in fetched.items() if not _is_cached(hub_id.repo, info.sha, name)}
    if missing:
        _agree(hub_id, sum(missing.values()), ask)
    # By its name, not its commit, so that the cache knows later which commit the name means.
    return _fetched(
        hub_id,
        lambda: snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=list(fetched)),
    )


def _model_info(hub_id: HubId) -> Any:
    """What the hub says of a model. Raises `ConnectionError` where it cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True)
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id.repo} is gated: accept its terms on the hub and log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{hub_id.repo} has no revision {hub_id.revision!r}; give a branch, tag or commit of it"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is neither a directory nor a model on the hub named {hub_id.repo}; check the spelling, "
            f"and log in with 'hf auth login' if it is private"
        ) from None
    except Exception as error:
        # Every HTTP library fails in its own way; all of them mean that the hub did not answer.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"the hub cannot be reached ({reason[:200]})") from None


def _files_of(hub_id: HubId, info: Any) -> dict[str, int]:
    """The files of a model that are needed and their sizes: weights as the index lists them, side files."""
    sizes = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or ()}
    wanted = {name for name in sizes if _SIDE_FILES.fullmatch(name)}
    wanted |= {weights for note, weights in _BESIDE.items() if {note, weights} <= set(sizes)}
    incomplete = UnsupportedModelError(
        f"{hub_id} on the hub has no complete safetensors weights, the only kind that mixtura reads; "
        f"choose another revision or a model that has them"
    )
    if not any(name.endswith(".safetensors") for name in sizes):
        raise incomplete
    config = _json_of(hub_id, info, "config.json") if "config.json" in sizes else {}
    first = first_file(sizes.__contains__, config)
    if first is None:
        raise without_weights(sizes, f"{hub_id} on the hub")
    shards = {first}
    if first.endswith(INDEX_SUFFIX):
        folder = first.rpartition("/")[0]
        named = set(weight_map(_json_of(hub_id, info, first), f"{first} of {hub_id}").values())
        shards |= {f"{folder}/{name}" if folder else name for name in named}
    if not shards <= set(sizes):
        raise incomplete
    return {name: sizes[name] for name in (*sorted(wanted - shards), *sorted(shards))}


def _json_of(hub_id: HubId, info: Any, name: str) -> dict[str, Any]:
    """A small file of the hub as JSON."""
    from huggingface_hub import hf_hub_download

    file = _fetched(hub_id, lambda: hf_hub_download(hub_id.repo, name, revision=info.sha))
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} of {hub_id} holds no JSON object; choose another revision")
    return content


def _is_cached(repo: str, commit: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)


def _agree(hub_id: HubId, num_bytes: int, ask: Ask | None) -> None:
    """Check the disk's room and ask for consent to a download."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + _SPARE_BYTES > free:
        raise OutputError(
            f"{hub_id} needs {format_bytes(num_bytes)} to download but {cache} has {format_bytes(free)} "
            f"free; make room or set HF_HOME to another disk"
        )
    if ask is None:
        raise UserError(f"{hub_id} is not on this machine; give --yes to download {format_bytes(num_bytes)}")
    if not ask(f"Download {hub_id}, {format_bytes(num_bytes)}, to {cache}?"):
        raise UserError(f"{hub_id} was not downloaded, as asked")


def _fetched(hub_id: HubId, download: Callable[[], str]) -> Path:
    """What a download gives, or an error that says how to go on."""
    try:
        return Path(download())
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the download of {hub_id} stopped ({reason[:200]}); run the command again, what has come is kept"
        ) from None


def _cached(hub_id: HubId, why: str) -> Path:
    """The newest whole copy that the hub's cache holds."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(hub_id.repo, "config.json", revision=hub_id.revision)
    if not isinstance(config, str):
        raise CheckpointError(
            f"there is no directory {hub_id}, {why}, and its cache {constants.HF_HUB_CACHE} does not hold "
            f"{hub_id}; give a directory, or run once with the hub in reach"
        )
    return Path(config).parent
