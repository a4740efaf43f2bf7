"""Read models and adapters from the hub through its own client, with the client's cache, token, offline switch and mirrors."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.errors import InputChangedError, InputError, MissingInputError, StorageError, StreamerError
from streamer.events import Event, Monitor
from streamer.packages import require_package
from streamer.remote.addresses import HubName
from streamer.remote.cache import at_once
from streamer.remote.listing import Listing, check_small, needed_names, refuse_pipeline, shards_of
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_json_object
from streamer.storage.remote_access import without_secrets
from streamer.storage.remote_manifest import RemoteFile
from streamer.storage.remote_retries import stat_remote


def _hub(shown: str) -> Any:
    return require_package(
        "huggingface_hub", (0, 25), f"{shown}: no such path, and a name on the hub needs huggingface_hub 0.25", "hub"
    )


@dataclass(frozen=True)
class HubFiles:
    """Needed files of one commit.

    Attributes
    ----------
    commit
        Hash of the commit.
    small, weights
        Names relative to the repository; see `needed_names`.
    """

    name: HubName
    commit: str
    small: list[str]
    weights: list[str]

    @property
    def start(self) -> str:
        """Return the directory in the repository as a prefix of names."""
        inside = self.name.inside
        return f"{inside}/" if inside and not inside.endswith(".safetensors") else ""

    @property
    def is_adapter(self) -> bool:
        """Return whether this is an adapter, which is small enough to be always downloaded."""
        names = {path.removeprefix(self.start) for path in (*self.small, *self.weights)}
        return CONFIG_NAME in names and not names & {INDEX_NAME, SINGLE_NAME}

    @property
    def file(self) -> str:
        """Return the single file that was named; empty for a directory."""
        inside = self.name.inside
        return inside.rpartition("/")[2] if inside.endswith(".safetensors") else ""

    def directory(self, snapshot: Path) -> Path:
        """Return the directory for what was named, below the repository's directory."""
        return snapshot / (self.name.inside.rpartition("/")[0] if self.file else self.name.inside)


def list_hub(name: HubName) -> HubFiles:
    """Resolve a revision, and list the needed files.

    Raises
    ------
    InputError, StorageError
        If it does not exist, access is denied, or the hub does not answer.
    """
    hub = _hub(name.shown)
    with _said(name), _quiet():
        info = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        listed = {
            str(sibling.rfilename): sibling.size or 0 for sibling in info.siblings or ()
        }  # a mirror may not state sizes
    if not re.fullmatch("[0-9a-f]{7,64}", str(info.sha)):
        raise InputError(f"{name.shown}: the hub states no commit, which would identify its version; check HF_ENDPOINT")
    commit, found = str(info.sha), HubFiles(name, str(info.sha), [], [])
    if found.file:
        if name.inside not in listed:
            raise MissingInputError(f"{name.shown}: has no such file; check its name", name.shown)
        return HubFiles(name, commit, [], [name.inside])
    start = found.start
    inside = [path.removeprefix(start) for path in listed if path.startswith(start)]
    refuse_pipeline(name.shown, inside)

    def read_shards() -> list[str]:
        check_small(f"{name.shown}/{INDEX_NAME}", listed[start + INDEX_NAME])
        with _said(name), _quiet():
            path = Path(hub.hf_hub_download(name.repo, start + INDEX_NAME, revision=commit))
        return shards_of(read_json_object(path), f"{name.shown}/{INDEX_NAME}")

    small, weights = needed_names(inside, read_shards)
    for one in small:
        check_small(f"{name.shown}/{one}", listed[start + one])
    if not weights and CONFIG_NAME not in small:
        raise MissingInputError(
            f"{name.shown}: expected a model or an adapter in safetensors, found neither {SINGLE_NAME} nor {INDEX_NAME}; check its name",
            name.shown,
        )
    return HubFiles(name, commit, [start + one for one in small], [start + one for one in weights])


def cached_snapshot(name: HubName) -> Path | None:
    """Find a revision in the hub's cache without contacting the hub."""
    hub = _hub(name.shown)
    inside = name.inside
    tried = [inside] if inside.endswith(".safetensors") else [
        f"{inside}/{one}".lstrip("/") for one in ("config.json", CONFIG_NAME, INDEX_NAME, SINGLE_NAME)
    ]  # fmt: skip
    for one in tried:
        path = hub.try_to_load_from_cache(name.repo, one, revision=name.revision)
        if isinstance(path, str):
            return Path(path) if one == inside else Path(path).parent
    return None


def is_offline() -> bool:
    """Test whether the hub's own switch forbids contacting it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def snapshot(files: HubFiles, names: list[str], monitor: Monitor) -> Path:
    """Download files into the hub's cache unless they exist, and return the commit's directory."""
    name, hub = files.name, _hub(files.name.shown)
    root: Path | None = None
    with _said(name), _quiet():
        for i, one in enumerate(names):
            monitor.checkpoint()
            monitor.emit(Event("download", one, i, len(names), i, len(names)))
            # Request the first file by the revision as named, so that the hub's cache can resolve it offline too.
            path = Path(hub.hf_hub_download(name.repo, one, revision=files.commit if i else name.revision))
            root = path.parents[one.count("/")]
            if root.name != files.commit:
                raise InputChangedError(
                    f"{name.shown}: changed to another commit a moment ago; run the same command again"
                )
    monitor.emit(Event("download", "", len(names), len(names), len(names), len(names)))
    assert root is not None
    return root


def listing_of(files: HubFiles) -> Listing:
    """Query the sizes and versions of the weight files, which are read by ranges."""
    name, hub = files.name, _hub(files.name.shown)

    def ask(path: str) -> RemoteFile:
        url, shown = hub.hf_hub_url(name.repo, path, revision=files.commit), f"{name.repo}@{files.commit[:12]}/{path}"
        stat = stat_remote(url, shown, token=True)
        if stat is None:
            raise MissingInputError(f"{shown}: no such file; check its name", shown)
        return RemoteFile(url, shown, stat.size, stat.version, token=True)

    start = len(files.start) if not files.file else len(name.inside) - len(files.file)
    weights = {path[start:]: file for path, file in zip(files.weights, at_once(ask, files.weights), strict=True)}
    return Listing(name.repo.rpartition("/")[2], name.shown, {}, weights, file=files.file)


def missing_bytes(files: HubFiles, listing: Listing) -> int:
    """Return the bytes of weights that the hub's cache does not have yet."""
    hub = _hub(files.name.shown)
    sizes = [file.size for file in listing.weights.values()]
    there = [
        isinstance(hub.try_to_load_from_cache(files.name.repo, path, revision=files.commit), str)
        for path in files.weights
    ]
    return sum(size for size, here in zip(sizes, there, strict=True) if not here)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the hub client's bars and its log of failed attempts: progress has its own bars, and an error its own line."""
    utils, logger = import_module("huggingface_hub.utils"), logging.getLogger("huggingface_hub")
    level, hidden = logger.level, utils.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    if not hidden:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not hidden:
            utils.enable_progress_bars()


@contextmanager
def _said(name: HubName) -> Iterator[None]:
    """Turn errors of the hub's client into errors that say what to do."""
    errors, shown = import_module("huggingface_hub.errors"), name.shown
    try:
        yield
    except StreamerError:
        raise
    except errors.GatedRepoError as e:
        raise InputError(
            f"{shown}: is gated on the hub; ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise MissingInputError(
            f"{shown}: no such path, and the hub has no model {name.repo}, or it is private; check the name, or log in with "
            "`hf auth login`", shown,
        ) from e  # fmt: skip
    except errors.RevisionNotFoundError as e:
        raise MissingInputError(
            f"{shown}: the hub has no revision {name.revision!r} of it; check its name", shown
        ) from e
    except errors.HFValidationError as e:
        raise MissingInputError(f"{shown}: no such path, and not a valid hub name; check it", shown) from e
    except errors.OfflineModeIsEnabled as e:
        raise offline(name) from e
    except errors.HfHubHTTPError as e:
        if (status := _status(e) or _status(e.__cause__)) is None:
            raise Unreachable(
                f"{shown}: no such path, and the hub cannot be reached; check the path or the network"
            ) from e
        raise _refusal(shown, status) from e
    except (OSError, RuntimeError) as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{shown}: cannot download: {e.strerror}; make room, or name another HF_HOME") from e
        if (status := _status(e.__cause__)) is not None:
            raise _refusal(shown, status) from e
        raise Unreachable(
            f"{shown}: no such path, and the hub cannot be reached ({type(e).__name__}); check the path or the network"
        ) from e
    except Exception as e:  # of the client's transport, which differs by version
        raise Unreachable(
            f"{shown}: no such path, and the hub cannot be reached ({type(e).__name__}: {without_secrets(str(e))[:80]}); check the path "
            "or the network"
        ) from e


def _status(e: BaseException | None) -> int | None:
    """Return the HTTP status of the response behind an error of the hub's client."""
    status = getattr(getattr(e, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _refusal(shown: str, status: int) -> StreamerError:
    if status in (401, 403):
        return InputError(
            f"{shown}: the hub refuses it (status {status}); log in with `hf auth login`, or set HF_TOKEN"
        )
    return StorageError(f"{shown}: the hub answers with status {status}; run the same command again later")


class Unreachable(StorageError):
    """Raised if the hub does not answer."""


def offline(name: HubName) -> MissingInputError:
    """Make the error for a hub name that is not cached while offline."""
    return MissingInputError(
        f"{name.shown}: no such path, nor is it in the hub's cache, and HF_HUB_OFFLINE is set; check the path, or unset it",
        name.shown,
    )
