"""Read files in buckets, ``s3://``, ``gs://`` and ``az://``, through fsspec and its plugins, which find credentials themselves."""

from __future__ import annotations

from typing import Any

from streamer.errors import InputChangedError, InputError, MissingPackageError, StorageError
from streamer.packages import require_package
from streamer.storage.remote_access import Access, RemoteStat, Transient, without_secrets
from streamer.storage.remote_manifest import RemoteFile

SCHEMES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""The plugin for each scheme."""

VERSIONS = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime")
"""Keys by which file systems state a file's version, in order of preference."""


class BucketAccess(Access):
    """Ranges through fsspec."""

    def stat(self, url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
        """Request a file's size and version."""
        try:
            fs, path = file_system(url, shown)
            fs.invalidate_cache()
            info = fs.info(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except Exception as e:  # each plugin has its own exceptions
            raise _error(e, shown) from e
        if info.get("type") == "directory" or info.get("size") is None:
            return None
        return RemoteStat(int(info["size"]), version_of(info, shown))

    def fetch(self, file: RemoteFile, out: memoryview, at: int) -> int:
        """Read a range."""
        try:
            fs, path = file_system(file.url, file.shown)
            data = fs.cat_file(path, start=at, end=at + len(out))
        except FileNotFoundError as e:
            raise InputChangedError.vanished(file.shown) from e
        except Exception as e:  # each plugin has its own exceptions
            error = _error(e, file.shown)
            if isinstance(error, InputError):  # credentials expired during the run; with new ones it can continue
                error = StorageError(f"{error}; then run the same command again")
            raise error from e
        if len(data) > len(out):
            raise Transient("the server gives more than the range")
        out[: len(data)] = data
        return len(data)


def file_system(url: str, shown: str) -> tuple[Any, str]:
    """Open the file system of a URL.

    Raises
    ------
    MissingPackageError
        If fsspec or its plugin is not installed.
    """
    fsspec = require_package("fsspec", (2023,), "reading from buckets needs fsspec 2023", "remote")
    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError:
        plugin = SCHEMES[scheme]
        raise MissingPackageError(
            f"{shown}: reading from {scheme}:// needs {plugin}, which is not installed; pip install 'intruder-streamer[remote]'",
            plugin,
        ) from None
    return fs, path


def list_files(url: str, shown: str) -> dict[str, RemoteFile]:
    """List the files below a URL, by their relative names.

    Raises
    ------
    InputError, StorageError
        If the files cannot be listed.
    """
    try:
        fs, path = file_system(url, shown)
        fs.invalidate_cache()
        found = fs.find(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as e:  # each plugin has its own exceptions
        error = _error(e, shown)
        if isinstance(error, Transient):
            raise StorageError(f"{shown}: cannot list: {error}; run the same command again") from e
        raise error from e
    scheme, start = url.partition("://")[0], path.rstrip("/") + "/"
    return {
        full.removeprefix(start): RemoteFile(f"{scheme}://{full}", f"{scheme}://{full}", int(info["size"]), version_of(info, shown))
        for full, info in found.items() if full.startswith(start)
    }  # fmt: skip


def version_of(info: dict[str, Any], shown: str) -> str:
    """Return a file's version from its file system's information.

    Raises
    ------
    StorageError
        If there is no version.
    """
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    if not version:
        raise StorageError(
            f"{shown}: its server states no version, so a change could not be noticed; download it and give the directory"
        )
    return version


def _error(e: Exception, shown: str) -> Exception:
    """Convert an exception of fsspec or a plugin into a transient error, or one that says what to do."""
    name = type(e).__name__
    if isinstance(e, MissingPackageError):
        return e
    if isinstance(e, PermissionError) or "Credential" in name or "AuthenticationRequired" in name:
        return InputError(f"{shown}: may not be read ({name}); set credentials as for the bucket's own client")
    if isinstance(e, NotImplementedError | TypeError | AttributeError):
        return StorageError(f"{shown}: cannot read: {name}: {without_secrets(str(e))}; update the plugin of fsspec")
    return Transient(f"{name}: {without_secrets(str(e))[:120]}" if str(e) else name)
