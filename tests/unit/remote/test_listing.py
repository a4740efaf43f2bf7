"""Diffusers pipelines and their adapters at an address are refused by name, before anything is downloaded."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import three_shards
from hub_server import COMMIT, HubHandler
from pipelines import LORA, write_pipeline
from range_server import Handler, serving
from safetensors.torch import save_file

from streamer.errors import UnsupportedError
from streamer.remote import inputs
from streamer.remote.inputs import HubName, Url, list_address, needed_files
from streamer.storage.remote_source import RemoteFile


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pipeline(tmp_path / "owner" / "base")
    (tmp_path / "owner" / "adapter").mkdir()
    for name in (LORA, "README.md"):
        (tmp_path / "owner" / "adapter" / name).write_bytes(bytes(9))
    return tmp_path


PIPELINES = [("base", "a diffusers pipeline"), ("adapter", "an adapter of a diffusers pipeline")]
NEXT = "is not read remotely; download it and name its directory"


@pytest.mark.parametrize(("name", "words"), PIPELINES)
def test_files_at_an_https_address_are_asked_for_by_name(root: Path, name: str, words: str) -> None:
    with serving(root, Handler) as site:
        url = f"{site.address}/owner/{name}"
        with pytest.raises(UnsupportedError, match=f"{name}: {words} {NEXT}"):
            list_address(Url(url, url))


@pytest.mark.parametrize(("name", "words"), PIPELINES)
def test_files_on_the_hub_are_listed(
    root: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving(root, HubHandler) as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(UnsupportedError, match=f"owner/{name}: {words} {NEXT}"):
            inputs.list_hub(HubName(f"owner/{name}", COMMIT, "", f"owner/{name}"))


@pytest.mark.parametrize(
    "beside", ["model.safetensors", "model.safetensors.index.json", "adapter_config.json"]
)
def test_a_model_or_adapter_beside_the_names_of_a_pipeline(beside: str) -> None:
    names = {beside, "model_index.json", shard := "model-00001-of-00001.safetensors"}
    small, weights = needed_files(
        "here", {name: RemoteFile(name, name, 9, "1") for name in (*names, LORA)}, [shard]
    )
    assert {*small, *weights} == names


def test_a_file_that_states_a_quantization_is_found_without_a_list(tmp_path: Path) -> None:
    """Without this file, packed values would be read as plain ones."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    small = {"config.json", "hf_quant_config.json"}
    for name in small:
        (tmp_path / name).write_text("{}")
    with serving(tmp_path, Handler) as site:
        assert {*list_address(Url(site.address, site.address)).small} == small


def test_a_server_without_ranges_is_refused_as_one(tmp_path: Path) -> None:
    """Python's own answers with whole files; a sharded model's index is read all the same."""
    base, _ = three_shards(tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=base)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            UnsupportedError,
            match=r"model-0000\d-of-00003.safetensors: .* gives whole files only; download it",
        ):
            list_address(Url(url, url))
        server.shutdown()
