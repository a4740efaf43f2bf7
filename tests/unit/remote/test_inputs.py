"""What is a path, a name on the hub, or an address; and what of an address is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamer.errors import UsageError
from streamer.remote.inputs import HubName, Url, parse_address


@pytest.mark.parametrize(
    ("text", "repo", "revision", "inside"),
    [
        ("owner/name", "owner/name", None, ""),
        ("owner/name@v1.0", "owner/name", "v1.0", ""),
        ("owner/name@abc/sub/dir", "owner/name", "abc", "sub/dir"),
        ("owner/name/sub", "owner/name", None, "sub"),
        ("owner/name/sub/model.safetensors", "owner/name", None, "sub/model.safetensors"),
        ("hf://owner/name@main", "owner/name", "main", ""),
        ("https://huggingface.co/owner/name", "owner/name", None, ""),
        ("https://hf.co/owner/name/tree/dev/sub", "owner/name", "dev", "sub"),
    ],
)
def test_names_on_the_hub(text: str, repo: str, revision: str | None, inside: str) -> None:
    assert parse_address(text) == HubName(repo, revision, inside, text)


def test_what_exists_or_begins_like_a_path_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists, begins like a path, or lies in a directory that does."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    paths = (
        "models/llama",
        "./owner/name",
        "../owner/name",
        "/owner/name",
        "name",
        "~/a",
        "a//b",
        "owner/x.safetensors",
    )
    for text in (*paths, "models/a/b"):
        assert parse_address(text) is None, text
    Path("owner/name").mkdir(parents=True)
    assert parse_address("owner/name") is None


def test_secrets_are_not_shown() -> None:
    url = parse_address("https://user:word@host:8/dir/?X-Signature=key#part")
    assert isinstance(url, Url)
    assert (url.shown, url.name) == ("https://host:8/dir/", "dir")
    assert url.below("config.json") == (
        "https://user:word@host:8/dir/config.json?X-Signature=key#part",
        "https://host:8/dir/config.json",
    )


@pytest.mark.parametrize("text", ["ftp://host/dir", "hf://name", "hf://a/b/../c"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_address(text)
