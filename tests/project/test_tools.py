"""The tools do what they say: checkpoints that transformers loads and whose intruders are found, a benchmark with all its figures."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import ENV
from make_checkpoint import HUB_SHARD_BYTES, split
from paths import TOOLS
from peft import PeftModel
from safetensors.torch import load_file
from shapes import KNOWN
from tool_calls import call_tool
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamer
from streamer.storage.atomic_file import plan_shard

SMALL = ("--hidden", "192", "--layers", "2")


def run_tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / name, *map(str, args)],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )


def make(directory: Path, *args: object) -> dict:
    done = call_tool("make_checkpoint", directory, "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("like", "experts", "matrices", "planted"),
    [
        ("llama-3-70b", (), 14, 8),
        ("mixtral", ("--experts", 4), 24, 10),
        ("qwen3-moe", ("--experts", 4), 24, 10),
    ],
)
def test_a_tiny_one_like_a_model_of_the_hub_loads_in_transformers_and_peft(
    tmp_path: Path, like: str, experts: tuple, matrices: int, planted: int
) -> None:
    tree = make(tmp_path, *SMALL, "--kv-heads", 4, "--like", like, *experts, "--shard-bytes", "1e6")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    assert model.config.architectures == [type(model).__name__]
    assert sum(p.nbytes for p in model.parameters()) == tree["bytes"]
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    base = {name: p.clone() for name, p in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # PEFT only warns
        peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    merged = peft.merge_and_unload().state_dict()

    found = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    assert len(found.matrices) == tree["matrices"] == matrices
    counts = {m.tensor: len(m.detection.intruders) for m in found if m.detection.intruders}
    assert counts == tree["planted"]
    assert sum(counts.values()) == planted
    for m in found:  # what PEFT adds, where it adds it
        name, _, expert = m.tensor.rstrip("]").partition("[")
        change = merged[name].float() - base[name].float()
        change = change[int(expert)] if expert else change
        if m.tensor in counts:
            assert torch.linalg.matrix_norm(change, 2) > 1.2


@pytest.mark.parametrize(
    ("like", "total", "files"),
    [
        ("llama-3-8b", 16060522496, [4976698672, 4999802720, 4915916176, 1168138808]),
        ("llama-3-70b", 141107412992, 30),
        ("mixtral", 93405585408, 19),
        ("qwen3-moe", 61064245248, 13),  # its authors cut it at 4 GB
    ],
)
def test_sizes_are_those_of_the_hub(like: str, total: int, files: list[int] | int) -> None:
    """What the index and the files of Meta-Llama-3-8B and the others say."""
    model = KNOWN[like]
    assert model.nbytes("BF16") == total
    names = split(model, "BF16", None, HUB_SHARD_BYTES)
    if isinstance(files, int):
        assert len(names) == files
        return
    plans = [
        plan_shard(
            "x", [(name, "BF16", model.tensors[name]) for name in sorted(group)], {"format": "pt"}
        )
        for group in names
    ]
    assert [plan.nbytes for plan in plans] == files


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--hidden", 64, "--size-gb", 1, "--layers", 3), "give one of --size-gb and --layers"),
        (("--hidden", 64, "--rank", 1), "--rank: expected at least 2"),
        (("--hidden", 66), "must divide"),
        (("--like", "llama-3-8b", "--experts", 4), "--experts: only a mixture has them"),
        (("--hidden", 64, "--shards", 999), "--shards: expected 1 to"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, args: tuple, message: str
) -> None:
    done = call_tool("make_checkpoint", tmp_path / "new", *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_the_peers_of_merge_do_what_they_are_named_for(tmp_path: Path) -> None:
    """Or their times would mean nothing: a copy of every tensor, and PEFT's own sum."""
    make(tmp_path, *SMALL, "--shards", 2, "--dtype", "fp32")
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    for name, *more in (("loop", base), ("shards", base, adapter)):
        done = run_tool("merge_peers.py", name, *more, tmp_path / name)
        assert done.returncode == 0, done.stderr
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "own", mitigation_lambda=1
    )
    for shard in base.glob("*.safetensors"):
        old, copied, merged, own = (
            load_file(tmp_path / d / shard.name) for d in ("base", "loop", "shards", "own")
        )
        assert set(old) == set(copied) == set(merged)
        assert all(torch.equal(t, copied[name]) for name, t in old.items())
        assert any(not torch.equal(t, merged[name]) for name, t in old.items())
        for name, t in merged.items():
            torch.testing.assert_close(t, own[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_trained_model_loads_and_its_adapters_are_certified_whole(tmp_path: Path) -> None:
    tree = run_tool(
        "train_small.py", tmp_path / "made", "--hidden", 96, "--layers", 2, "--steps", 60, "--json"
    )
    assert tree.returncode == 0, tree.stderr
    made = json.loads(tree.stdout)
    tokenizer = AutoTokenizer.from_pretrained(made["base"])
    written = {}
    for name in ("general", "task", "general-test", "task-test"):
        written[name] = text = (tmp_path / "made" / f"{name}.txt").read_text(encoding="utf-8")
        assert len(text) >= 70_000
        assert tokenizer.decode(tokenizer(text[:2000])["input_ids"]) == text[:2000]
    assert len(set(written.values())) == 4
    losses = made["losses"]
    assert losses["base"]["general"] < losses["base"]["task"]
    for adapter in made["adapters"]:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made["base"]), adapter)
        found = streamer.detect_intruder_dimensions(made["base"], adapter)
        assert len(found) == 14
        assert all(m.detection.certified for m in found)
    assert losses["high"]["task"] < losses["base"]["task"]
