"""List the files at ``https://`` addresses and in buckets."""

from __future__ import annotations

from collections.abc import Iterable
from secrets import token_hex
from typing import Any

from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from streamer.errors import FormatError, InputError, MissingInputError, UnsupportedError
from streamer.remote.addresses import Url
from streamer.remote.cache import at_once, parse_json
from streamer.remote.listing import PIPELINE_FILES, Listing, check_small, needed_names, refuse_pipeline, shards_of
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, check_shard_name
from streamer.storage.remote_access import no_ranges
from streamer.storage.remote_buckets import SCHEMES, list_files
from streamer.storage.remote_manifest import RemoteFile
from streamer.storage.remote_retries import read_range, stat_remote

KNOWN_NAMES = (
    "config.json", "hf_quant_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", *PIPELINE_FILES,
)  # fmt: skip
"""Files that a model, adapter or pipeline may have, by the names that libraries give them; an https server does not list files."""


def list_address(url: Url) -> Listing:
    """List the files at an address.

    Raises
    ------
    MissingInputError
        If there is neither a model nor an adapter.
    InputError, StorageError
        If access is denied, or no server answers.
    """
    scheme = url.text.partition("://")[0]
    if url.name.endswith(".safetensors"):
        return _one_file(url)
    listing = _bucket(url) if scheme in SCHEMES else _web(url)
    for file in listing.small.values():
        check_small(file.shown, file.size)
    if not listing.weights:
        raise MissingInputError(
            f"{url.shown}: expected a model or an adapter, found neither {SINGLE_NAME}, {INDEX_NAME} nor {WEIGHTS_NAME}; check the address",
            url.shown,
        )
    return listing


def _one_file(url: Url) -> Listing:
    stat = stat_remote(url.text, url.shown)
    if stat is None:
        raise MissingInputError(f"{url.shown}: no such file; check the address", url.shown)
    if not stat.ranges:
        raise no_ranges(url.shown)
    name = check_shard_name(url.name, url.shown)
    return Listing(name, url.shown, {}, {name: RemoteFile(url.text, url.shown, stat.size, stat.version)}, file=name)


def _bucket(url: Url) -> Listing:
    files = list_files(url.text, url.shown)
    refuse_pipeline(url.shown, files)
    small, weights = needed_names(files, lambda: _shards(files[INDEX_NAME]))
    return Listing(url.name, url.shown, {name: files[name] for name in small}, {name: files[name] for name in weights})


def _web(url: Url) -> Listing:
    """Request each file by name, because there is no list."""
    asked, told = [INDEX_NAME, SINGLE_NAME, CONFIG_NAME, WEIGHTS_NAME, *KNOWN_NAMES], _tells_absent(url)
    found, told = _ask(url, asked, {INDEX_NAME, SINGLE_NAME, WEIGHTS_NAME}, 1, told)
    refuse_pipeline(url.shown, found)
    found.pop(LORA_NAME, None)
    weights = {name: found.pop(name) for name in (SINGLE_NAME, WEIGHTS_NAME) if name in found}
    if INDEX_NAME in found:
        shards = _shards(found[INDEX_NAME])
        there, _ = _ask(url, shards, set(shards), len(shards), told)
        weights |= {name: there[name] for name in shards if name in there}
    if "config.json" in found:
        code = remote_code(_json(found["config.json"]))
        found |= _ask(url, code, set(), 0, told)[0]
    for file in weights.values():
        if not file.version:
            raise no_ranges(file.shown)
    return Listing(url.name, url.shown, dict(sorted(found.items())), weights)


def _tells_absent(url: Url) -> bool:
    """Request a file with a made-up name to see whether the server reports absent files, as opposed to refusing access.

    Raises
    ------
    UnsupportedError
        If the server returns such a file; existing files then cannot be distinguished from missing ones.
    """
    name = f"no-such-file-{token_hex(8)}.json"
    try:
        stat = stat_remote(*url.below(name))
    except UnsupportedError:
        raise
    except InputError:
        return False
    if stat is not None:
        raise UnsupportedError(
            f"{url.shown}: the server answers every name, even {name}, so missing files cannot be detected; "
            "download them and name the directory"
        )
    return True


def _ask(
    url: Url, names: Iterable[str], weights: set[str], least: int, told: bool
) -> tuple[dict[str, RemoteFile], bool]:
    """Determine which of some files exist.

    A bucket that may not be listed refuses missing files as well as forbidden ones. So a refused file counts as missing only if the server
    has reported no file as absent, here or before (`told`), and at least `least` of the `weights` were found.

    Returns
    -------
    dict, bool
        The existing files, and whether the server reports absent files.
    """
    names = list(names)

    def ask(name: str) -> RemoteFile | InputError | None:
        at, shown = url.below(name)
        try:
            stat = stat_remote(at, shown)
        except UnsupportedError:
            raise
        except InputError as e:
            return e
        if stat is None:
            return None
        version = stat.version if stat.ranges or not name.endswith(".safetensors") else ""
        return RemoteFile(at, shown, stat.size, version)

    answers = dict(zip(names, at_once(ask, names), strict=True))
    found = {name: answer for name, answer in answers.items() if isinstance(answer, RemoteFile)}
    refusals = [answer for answer in answers.values() if isinstance(answer, InputError)]
    told = told or None in answers.values()
    if refusals and (told or len(weights & found.keys()) < least):
        raise refusals[0]
    return found, told


def remote_code(config: dict[str, Any]) -> list[str]:
    """List the files of a model's own code to which its config refers."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = dict.fromkeys(name.partition(".")[0] for name in names if isinstance(name, str) and "--" not in name)
    return [f"{module}.py" for module in modules if module.isidentifier()]


def _shards(index: RemoteFile) -> list[str]:
    return shards_of(_json(index), index.shown)


def _json(file: RemoteFile) -> dict[str, Any]:
    """Read a JSON object from an address, which messages name."""
    check_small(file.shown, file.size)
    out = memoryview(bytearray(file.size))
    read_range(file, out, 0)
    tree = parse_json(bytes(out), file)
    if not isinstance(tree, dict):
        raise FormatError(f"{file.shown}: expected a JSON object, found {type(tree).__name__}; check the address")
    return tree
