"""Adapters and bases that do not fit, are broken, or lie where the output would go; keys that the user ignores."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import edit_adapter, refuse, refuse_everywhere
from forks import server
from helpers import tree_digest
from safetensors.torch import load_file, save_file


def test_every_problem_is_told_at_once(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job

    def change(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "base_model.model.model.layers."
        tensors[f"{prefix}1.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 47)
        tensors[f"{prefix}0.mlp.down_proj.lora_B.weight"] = torch.ones(50, 4)
        for i in range(20):
            tensors[f"{prefix}9.extra_{i}.lora_A.weight"] = torch.ones(4, 5)
            tensors[f"{prefix}9.extra_{i}.lora_B.weight"] = torch.ones(5, 4)

    edit_adapter(adapter, change)
    refuse_everywhere(
        base,
        adapter,
        tmp_path,
        3,
        "22 of 29 modules do not fit",
        "[50, 96]",
        "expected shape [48, 47] in the base, found [48, 48]",
        "; and 20 more; is this",
    )


def test_inputs_that_are_not_there_or_exchanged(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    refuse_everywhere(
        base,
        tmp_path / "no",
        tmp_path,
        3,
        f"{tmp_path / 'no'}: no such directory",
        "path of the adapter",
    )
    refuse_everywhere(
        tmp_path / "no", adapter, tmp_path, 3, f"{tmp_path / 'no'}: no such directory", "base model"
    )
    words = (
        "expected model.safetensors, found adapter_config.json, adapter_model.safetensors;",
        "in the order BASE ADAPTER",
    )
    refuse_everywhere(adapter, base, tmp_path, 3, str(adapter), *words)
    refuse_everywhere(adapter, adapter, tmp_path, 3, *words)
    (adapter / "adapter_model.safetensors").unlink()
    refuse_everywhere(
        base,
        adapter,
        tmp_path,
        3,
        "expected adapter_model.safetensors, found adapter_config.json; name an adapter",
    )


def test_outputs_that_would_touch_an_input(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Directories that cannot be outputs are those of `storage.transaction`; these are what a command adds to it."""
    base, adapter = job
    single = base / "model-00001-of-00003.safetensors"
    linked = tmp_path / "linked"
    linked.mkdir()
    os.link(single, linked / single.name)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "elsewhere")
    before = tree_digest(tmp_path)
    cases = [
        ("merge", adapter, "is the input"),
        ("merge", base / "new", "lies inside the input"),
        ("merge", linked, ""),
        ("mitigate", adapter, "is the input"),
        ("detect", single, "lies inside the input"),
        ("detect", adapter / "findings.safetensors", "lies inside the input"),
        ("detect", linked / single.name, ""),
        ("detect", tmp_path / "link.safetensors", "is a symlink"),
        ("detect", base, "is a directory"),
    ]
    for command, out, words in cases:
        for options in ([], ["--overwrite"], ["--dry-run"]):
            if linked in (
                out,
                out.parent,
            ):  # another name of an input: known as one where it would be replaced
                words = "is the input" if options == ["--overwrite"] else "exists"  # noqa: PLW2901
            done = server().run(command, base, adapter, "-o", out, *options)
            assert (done.code, done.out, done.calls) == (4, "", []), (command, out, options, done)
            assert (done.err.count("\n"), words in done.err) == (1, True), (command, out, done.err)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_a_foreign_file_is_kept(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    out = tmp_path / "out"
    out.mkdir()
    others = ["a.txt", "b.txt", "data", "notes.txt"]
    for other in others:
        (out / other).write_text("mine")
    done = server().run(command, base, adapter, "-o", out)
    assert (done.code, done.calls) == (4, [])
    assert done.err == (
        f"streamer: {out}: holds other files (a.txt, b.txt, data and 1 more); choose another directory, or pass --overwrite, which leaves "
        "them there\n"
    )
    assert server().run(command, base, adapter, "-o", out, "--overwrite").code == 0
    assert {(out / other).read_text() for other in others} == {"mine"}
    again = server().run(command, base, adapter, "-o", out)
    assert (again.code, "holds this very output already" in again.err) == (0, True)


def test_findings_over_a_foreign_file(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    words = "exists and is not findings, and no other file is replaced; choose another output, or move it away"
    for content in (b"mine", (adapter / "adapter_model.safetensors").read_bytes()):
        out.write_bytes(content)
        for options in ([], ["--overwrite"]):
            done = server().run("detect", base, adapter, "-o", out, *options)
            assert (done.code, done.calls) == (4, [])
            assert f"{out}: {words}" in done.err
            assert out.read_bytes() == content


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_copies_of_inputs_are_not_overwritten(
    job: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    """An adapter in a copy of a base, a model in one of an adapter: a loader's other choice is someone's weights."""
    base, adapter = job
    out = shutil.copytree({"merge": adapter, "mitigate": base}[command], tmp_path / "out")
    before = tree_digest(out)
    done = server().run(command, base, adapter, "-o", out, "--overwrite")
    assert (done.code, done.calls) == (4, [])
    assert "exists and is not ours; choose another output, or move it away" in done.err
    assert tree_digest(out) == before


# Findings that do not belong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_findings_of_something_else(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    findings = tmp_path / "findings.safetensors"
    assert server().run("detect", base, adapter, "-o", findings).code == 0
    use = ("--findings", findings)
    for options, words in [
        (("--top-k", "9"), "made with top_k=10, asked for 9; pass the same, or run detect again"),
        (("--epsilon", "0.4"), "made with threshold_epsilon=0.5, asked for 0.4"),
        (("--solver", "dense"), "made with solver='auto', asked for 'dense'"),
    ]:
        line = refuse(command, base, adapter, tmp_path, 3, *use, *options)
        assert f"{findings}: {words}" in line
    shard = base / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 2}, shard, metadata={"format": "pt"})
    line = refuse(command, base, adapter, tmp_path, 3, *use)
    assert (
        f"{findings}: made with another base (the content of {shard.name} differs); run detect again"
        in line
    )
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_adapter(
        adapter, lambda t: t.update({k: v * 1.01 for k, v in t.items() if "layers.0" in k})
    )
    line = refuse(command, base, adapter, tmp_path, 3, *use)
    assert f"{findings}: made with another adapter (weights_sha256" in line
    assert "run detect again on this one" in line


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_findings_that_are_none(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    shard = base / "model-00001-of-00003.safetensors"
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", shard)
    assert (
        f"{shard}: expected findings (streamer.findings/1), found another safetensors file" in line
    )
    assert "make them with `streamer detect`" in line
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", tmp_path / "no")
    assert f"{tmp_path / 'no'}: no such file" in line
    (tmp_path / "text").write_text("some text, long enough to have a length field")
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", tmp_path / "text")
    assert "not a safetensors file" in line


def test_a_name_that_is_not_utf_8(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Linux takes any bytes for a name, and JSON does not: records call the adapter by the bytes in hexadecimal."""
    base, adapter = job
    odd = tmp_path / os.fsdecode(b"ad\xffapter")
    try:
        shutil.copytree(adapter, odd)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    for command in ("inspect", "detect", "mitigate", "merge"):
        words = [] if command == "inspect" else ["-o", tmp_path / f"{command}.safetensors"]
        done = server().run(command, base, odd, *words, "--json")
        assert done.code == 0, done
        if command in ("mitigate", "merge"):
            assert json.loads(done.out)["adapter"]["name"] == "ad\\xffapter"
    findings = tmp_path / "detect.safetensors"
    assert (
        server().run("merge", base, odd, "-o", tmp_path / "again", "--findings", findings).code == 0
    )


WARNING = "'use_tomorrow', 'use_hyper' of adapter_config.json are ignored: the result relies on them not changing the delta"
IGNORE = ("--ignore-key", "use_tomorrow", "--ignore-key", "use_hyper")


@pytest.fixture
def keyed(job: tuple[Path, Path]) -> tuple[Path, Path]:
    config = job[1] / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "use_tomorrow": True, "use_hyper": 2})
    )
    return job


def run_ignoring(*args: object) -> dict[str, Any]:
    """Run a command that ignores both keys, and look for the one warning; with -q it is on stderr, with -qq nothing is."""
    done = server().run(*args, *IGNORE, "--json", "-q")
    assert (done.code, done.err, done.last) == (0, f"streamer: warning: {WARNING}\n", "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_ignored_keys_are_a_warning(keyed: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = keyed
    assert WARNING in run_ignoring("inspect", base, adapter)["warnings"]
    findings = tmp_path / "f.safetensors"
    output = tmp_path / "output"
    assert run_ignoring("detect", base, adapter, "-o", findings)["adapter"]["ignored_keys"] == [
        "use_tomorrow",
        "use_hyper",
    ]
    for command in ("merge", "mitigate"):
        made = output / command
        assert (
            WARNING
            in run_ignoring(command, base, adapter, "-o", made, "--method", "shrink")["warnings"]
        )
        assert WARNING in json.loads((made / "streamer.json").read_text())["warnings"]
    silent = server().run("inspect", base, adapter, *IGNORE, "-qq")
    assert (silent.code, silent.err + silent.last) == (0, "")
