"""The command line: what is refused, in one line and before anything is written; exit codes; JSON; silence; bars."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import warnings
from collections.abc import Callable
from pathlib import Path

import helpers
import peft
import pytest
import torch
from forks import Outcome, server
from helpers import ENV, tree_digest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from streamer.units import format_sizes

WRITING = ("detect", "merge", "mitigate")


def refuse(command: str, base: Path, adapter: Path, home: Path, code: int, *options: object) -> str:
    """Run a command that must be refused: its one line, the exit code checked, and that nothing at all was written."""
    out = home / "out.safetensors"  # a name for findings, and for a directory too
    before = tree_digest(home)
    done = server().run(command, base, adapter, "-o", out, *options)
    assert (done.code, done.out, done.calls) == (code, "", []), done
    assert done.err.startswith("streamer: ")
    assert done.err.count("\n") == 1
    assert len(re.sub(rf"{re.escape(str(home))}[^\s:;,']*", "", done.err)) <= 300, done.err  # paths apart
    assert not out.exists()
    assert tree_digest(home) == before
    return done.err


def refuse_everywhere(base: Path, adapter: Path, home: Path, code: int, *words: str) -> None:
    """Every writing command refuses, and `inspect`, in the same words; all of the given ones are among them."""
    said = {refuse(command, base, adapter, home, code) for command in WRITING}
    assert len(said) == 1
    line = said.pop()
    for word in words:
        assert word in line, line
    done = server().run("inspect", base, adapter)
    assert (done.code, done.err) == (code, line)


# Adapters and bases that do not fit, or are broken --------------------------------------------------------------------


def edit_adapter(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_module_that_the_base_lacks(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers.2.mlp.up_proj" in n]:
            tensors[name.replace("layers.2", "layers.3")] = tensors.pop(name)

    edit_adapter(adapter, change)
    refuse_everywhere(base, adapter, tmp_path, 3, str(adapter), "1 of 9 modules do not fit", str(base),
                      "'model.layers.3.mlp.up_proj' has no tensor in the base",
                      "is this the base that the adapter was trained on?")  # fmt: skip


def test_a_wrong_shape(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 47)

    edit_adapter(adapter, change)
    refuse_everywhere(base, adapter, tmp_path, 3, "'model.layers.1.self_attn.q_proj': expected shape [48, 47] in the base",
                      "in the base, found [48, 48]", "is this the base")  # fmt: skip


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
    refuse_everywhere(base, adapter, tmp_path, 3, "22 of 29 modules do not fit", "[48, 47]", "[50, 96]",
                      "; and 20 more; is this")  # fmt: skip


@pytest.mark.parametrize("cut", [1, 100, "half", "header"])
def test_a_truncated_shard(job: tuple[Path, Path], tmp_path: Path, cut: int | str) -> None:
    base, adapter = job
    shard = base / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    kept = {"half": size // 2, "header": 30}.get(str(cut), size - int(cut) if isinstance(cut, int) else 0)
    os.truncate(shard, kept)
    refuse_everywhere(base, adapter, tmp_path, 3, str(shard), "truncated", "get it again", format_sizes(size, kept)[1])


def test_a_truncated_adapter(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refuse_everywhere(base, adapter, tmp_path, 3, str(file), "the file is truncated; get it again")


def test_a_pickled_adapter(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    os.rename(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    refuse_everywhere(base, adapter, tmp_path, 3, "adapter_model.bin, a pickle", "save_pretrained")


def test_inputs_that_are_not_there_or_exchanged(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    refuse_everywhere(
        base, tmp_path / "no", tmp_path, 3, f"{tmp_path / 'no'}: no such directory", "path of the adapter"
    )
    refuse_everywhere(tmp_path / "no", adapter, tmp_path, 3, f"{tmp_path / 'no'}: no such directory", "base model")
    refuse_everywhere(
        adapter, base, tmp_path, 3, str(adapter), "is an adapter, not a base model; the order is BASE ADAPTER"
    )
    refuse_everywhere(adapter, adapter, tmp_path, 3, "is an adapter, not a base model; the order is BASE ADAPTER")
    (adapter / "adapter_model.safetensors").unlink()
    refuse_everywhere(base, adapter, tmp_path, 3, "expected adapter_model.safetensors, found none; finish the download")


@pytest.mark.parametrize("name", ["../base/model-00001-of-00003.safetensors", "/etc/passwd", "x\u0000.safetensors", 7])
def test_an_index_that_points_elsewhere(job: tuple[Path, Path], tmp_path: Path, name: object) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["model.layers.0.self_attn.q_proj.weight"] = name
    index.write_text(json.dumps(tree))
    refuse_everywhere(base, adapter, tmp_path, 3, str(index), "weight_map names",
                      "expected a plain .safetensors file name; do not trust this file")  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 4, "r": 4}', "\ufeff{}", '{"r": NaN}', "[" * 100_000])
def test_a_config_that_is_no_json(job: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    base, adapter = job
    (adapter / "adapter_config.json").write_text(text)
    refuse_everywhere(base, adapter, tmp_path, 3, f"{adapter / 'adapter_config.json'}: ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = helpers.three_shards(tmp_path)
    shard = base / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (
        torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        if dtype == torch.uint8
        else tensors[name].to(dtype)
    )
    save_file(tensors, shard)
    code = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    refuse_everywhere(base, adapter, tmp_path, 3, f"{shard}: tensor {name!r}: dtype {code} is not one of BF16, F16, F32, F64",
                      "nothing beside it says what its codes mean; use the 16-bit model")  # fmt: skip


def test_outputs_that_would_touch_an_input(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    before = tree_digest(tmp_path)
    single = base / "model-00001-of-00003.safetensors"
    outside = tmp_path / "file"
    outside.write_text("mine")
    for link in ("link", "link.safetensors"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / "linked"
    linked.mkdir()
    os.link(single, linked / single.name)
    cases = [
        ("merge", base, base, "is the input"),
        ("merge", base, adapter, "is the input"),
        ("merge", base, base / "new", "lies inside the input"),
        ("merge", base, tmp_path, "contains the input"),
        ("merge", base, tmp_path / "link", "is a symlink, and writing never follows one"),
        ("merge", base, linked, f"{linked / single.name}: is the input"),
        ("merge", base, outside / "x", "is not a directory"),
        ("merge", base, outside, "is not a directory"),
        ("detect", base, outside / "x.safetensors", "is not a directory"),
        ("mitigate", base, adapter, "is the input"),
        ("mitigate", base, adapter / "new", "lies inside the input"),
        ("detect", base, single, "lies inside the input"),
        ("detect", base, adapter / "findings.safetensors", "lies inside the input"),
        ("detect", base, linked / single.name, "is the input"),
        ("detect", base, tmp_path / "link.safetensors", "is a symlink"),
        ("detect", base, base, "is a directory"),
    ]
    for command, source, out, words in cases:
        for options in ([], ["--overwrite"], ["--dry-run"]):
            if out.parent == linked and "--overwrite" not in options:
                continue
            if out == linked and "--overwrite" not in options:
                words = "exists and is not ours; choose another output"  # noqa: PLW2901
            elif out == linked:
                words = f"{linked / single.name}: is the input"  # noqa: PLW2901
            done = server().run(command, source, adapter, "-o", out, *options)
            assert (done.code, done.out, done.calls) == (4, "", []), (command, out, options, done)
            assert done.err.count("\n") == 1
            assert words in done.err, (command, out, done.err)
    (tmp_path / "link").unlink()
    (tmp_path / "link.safetensors").unlink()
    shutil.rmtree(linked)
    outside.unlink()
    assert tree_digest(tmp_path) == before


def test_a_single_file_is_not_merged_into_its_own_directory(tmp_path: Path) -> None:
    module = "model.layers.0.mlp"
    home = tmp_path / "base"
    home.mkdir()
    file = home / "model.safetensors"
    save_file({f"{module}.weight": helpers.power_law(16, 12).float()}, file)
    adapter = helpers.write_adapter(tmp_path / "adapter", {module: helpers.intruding_factors(16, 12, 2)}, r=2)
    before = tree_digest(tmp_path)
    for out in (home, tmp_path):
        for options in ([], ["--overwrite"]):
            done = server().run("merge", file, adapter, "-o", out, *options)
            assert (done.code, done.calls) == (4, [])
            assert f"{out}: contains the input" in done.err
    assert tree_digest(tmp_path) == before
    assert server().run("merge", file, adapter, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_a_foreign_file_is_kept(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    out = tmp_path / "out"
    out.mkdir()
    name = {"merge": "config.json", "mitigate": "adapter_config.json"}[command]
    (out / name).write_text("mine")
    done = server().run(command, base, adapter, "-o", out)
    assert (done.code, done.calls) == (4, [])
    assert f"{out / name}: exists and is not ours; choose another output, or move it away" in done.err
    assert tree_digest(out).keys() == {name}
    (out / name).unlink()
    (out / "notes.txt").write_text("mine")
    assert server().run(command, base, adapter, "-o", out).code == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_findings_over_a_foreign_file(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    words = "exists and is not findings, which is all that is replaced; choose another output"
    for content in (b"mine", (adapter / "adapter_model.safetensors").read_bytes()):
        out.write_bytes(content)
        for options in ([], ["--overwrite"]):
            done = server().run("detect", base, adapter, "-o", out, *options)
            assert (done.code, done.calls) == (4, [])
            assert f"{out}: {words}" in done.err
            assert out.read_bytes() == content


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_copies_of_inputs_are_not_overwritten(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    """An adapter in a copy of a base, a model in one of an adapter: a loader's other choice is someone's weights."""
    base, adapter = job
    out = shutil.copytree({"merge": adapter, "mitigate": base}[command], tmp_path / "out")
    before = tree_digest(out)
    done = server().run(command, base, adapter, "-o", out, "--overwrite")
    assert (done.code, done.calls) == (4, [])
    assert "exists and is not ours; choose another output, or move it away" in done.err
    assert tree_digest(out) == before


# Kinds of adapters ----------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "base"
    llama().save_pretrained(path)
    return path


def lora(**config: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **config})


REFUSED = {
    "layer_replication": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "layer replication: the model has layers"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "its delta is relative to a residual of the base"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "aLoRA": (
        lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "aLoRA: acts on some tokens only, which no merged weight can express",
    ),
    "QALoRA": (lambda: lora(use_qalora=True), "QALoRA: pools its input, so lora_A does not have the base's width"),
    "BD-LoRA": (
        lambda: lora(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        "BD-LoRA: stores block-diagonal factors",
    ),
    "KaSA": (
        lambda: lora(kasa_config=peft.KasaConfig()),
        "KaSA: changes the base and adds a diagonal between the factors",
    ),
    "MonteCLoRA": (lambda: lora(monteclora_config=peft.MontecloraConfig()), "MonteCLoRA: samples its factors"),
    "VeLoRA": (
        lambda: lora(velora_config=peft.VeloraConfig()),
        "VeLoRA: is not supported: it keeps buffers beside the factors",
    ),
    "VeRA without its projections": (
        lambda: peft.VeraConfig(target_modules=["q_proj"], save_projection=False),
        "VeRA: its projections are not in the file (save_projection=false)",
    ),
    "HRA": (
        lambda: peft.HRAConfig(target_modules=["q_proj"]),
        "HRA adapter: its change of the weights is not known here",
    ),
    "IA3": (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 adapter"),
    "prompt": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING adapter"),
}

UNMERGED = {"layer_replication", "aLoRA", "QALoRA", "prompt"}


def save_peft(config: peft.PeftConfig, path: Path) -> Path:
    """Save an adapter as PEFT saves it, its lora_B not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on kinds that are refused anyway
        model = peft.get_peft_model(llama(), config)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_is_refused(llama_base: Path, tmp_path: Path, kind: str) -> None:
    config, words = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = config()
    adapter = save_peft(made, tmp_path / "adapter")
    refuse_everywhere(llama_base, adapter, tmp_path, 3, f"{adapter}/adapter_", "refused: ", words,
                      "; PEFT does not merge it either" if kind in UNMERGED else "merge such an adapter with PEFT instead")  # fmt: skip


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_an_adapter_that_peft_saved_is_taken(llama_base: Path, tmp_path: Path, init: bool | str) -> None:
    adapter = save_peft(lora(init_lora_weights=init, target_modules="all-linear"), tmp_path / "adapter")
    done = server().run("mitigate", llama_base, adapter, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert json.loads(done.out)["totals"]["matrices"] == 14
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as f:
        assert len(f.keys()) == 28


def test_an_arrow_router_is_refused(llama_base: Path, tmp_path: Path) -> None:
    """It needs the adapters that it routes between."""
    save_peft(lora(), tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.create_arrow_model(
            llama(), task_specific_adapter_paths=[str(tmp_path / "one")], arrow_config=peft.ArrowConfig(top_k=1)
        )
        model.save_pretrained(tmp_path / "saved", selected_adapters=["arrow_router"])
    refuse_everywhere(llama_base, tmp_path / "saved" / "arrow_router", tmp_path, 3, "refused: ",
                      "Arrow: routes between adapters at run time, which no merged weight can express")  # fmt: skip


def test_a_megatron_adapter_is_refused(llama_base: Path, tmp_path: Path) -> None:
    """PEFT makes one only where Megatron is installed: the config of a plain one is given what it would say."""
    adapter = save_peft(lora(), tmp_path / "adapter")
    tree = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(tree | {"megatron_config": {"hidden_size": 32}}))
    refuse_everywhere(llama_base, adapter, tmp_path, 3,
                      "Megatron LoRA: its tensors are split over ranks; convert it to plain PEFT first")  # fmt: skip


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT knows no config of such a model
        peft.get_peft_model(model, lora(target_modules=["0"])).save_pretrained(tmp_path / "adapter")
    refuse_everywhere(tmp_path / "base", tmp_path / "adapter", tmp_path, 3, "LoRA on a convolution with 2 groups")


def test_what_dora_and_other_methods_cannot_write(llama_base: Path, tmp_path: Path) -> None:
    for name, config in {"DoRA": lora(use_dora=True), "LoHa": peft.LoHaConfig(target_modules=["q_proj"])}.items():
        adapter = save_peft(config, tmp_path / name)
        line = refuse("mitigate", llama_base, adapter, tmp_path, 3, "--method", "shrink")
        assert (
            "the mitigated delta of 'model.layers.0.self_attn.q_proj' (and 1 more) has no form in this kind of adapter"
            in line
        )
        assert "`streamer merge` writes it into the base" in line
        assert server().run("mitigate", llama_base, adapter, "-o", tmp_path / f"same-{name}", "--lambda", "1").code == 0


def test_all_reasons_are_told_at_once(llama_base: Path, tmp_path: Path) -> None:
    config = lora(use_qalora=True, init_lora_weights="gaussian")
    adapter = save_peft(config, tmp_path / "adapter")
    tree = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(tree | {"use_hyper": True, "init_lora_weights": "magic"}))
    refuse_everywhere(llama_base, adapter, tmp_path, 3, "QALoRA", "unknown initialisation",
                      "unknown variant use_hyper=True: it may change what the tensors mean")  # fmt: skip


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
    assert f"{findings}: made with another base (the content of {shard.name} differs); run detect again" in line
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_adapter(adapter, lambda t: t.update({k: v * 1.01 for k, v in t.items() if "layers.0" in k}))
    line = refuse(command, base, adapter, tmp_path, 3, *use)
    assert f"{findings}: made with another adapter (weights_sha256" in line
    assert "run detect again on this one" in line


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_findings_that_are_none(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    shard = base / "model-00001-of-00003.safetensors"
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", shard)
    assert f"{shard}: expected findings (streamer.findings/1), found another safetensors file" in line
    assert "make them with `streamer detect`" in line
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", tmp_path / "no")
    assert f"{tmp_path / 'no'}: no such file" in line
    (tmp_path / "text").write_text("some text, long enough to have a length field")
    line = refuse(command, base, adapter, tmp_path, 3, "--findings", tmp_path / "text")
    assert "not a safetensors file" in line


def test_report_of_what_is_no_findings(job: tuple[Path, Path]) -> None:
    base, _ = job
    done = server().run("report", base / "model-00001-of-00003.safetensors")
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1
    done = server().run("report", base)
    assert done.code == 3
    assert done.err.count("\n") == 1


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--top-k", "0"],
            "streamer: --top-k: expected a count from 1, or a share in (0, 1] with a decimal point, found 0",
        ),
        (["--top-k", "-3"], "found -3"),
        (["--top-k", "1.5"], "found 1.5"),
        (["--epsilon", "0"], "streamer: --epsilon: expected a number in (0, 1], found 0.0"),
        (["--epsilon", "1.1"], "found 1.1"),
        (["--epsilon", "nan"], "found nan"),
        (["--threads", "0"], "--threads: expected a number from 1, found 0"),
        (["--device", "abacus"], "streamer: --device: expected auto, cpu, cuda or cuda:i, found 'abacus'"),
        (["--device", "cuda:99"], "streamer: --device: cuda:99 is not there; use cpu"),
    ],
)
def test_options_that_make_no_sense(job: tuple[Path, Path], tmp_path: Path, options: list[str], words: str) -> None:
    for command in WRITING:
        for dry in ([], ["--dry-run"]):
            assert words in refuse(command, *job, tmp_path, 2, *options, *dry)


@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_lambda_is_finite(job: tuple[Path, Path], tmp_path: Path, command: str, value: str) -> None:
    line = refuse(command, *job, tmp_path, 2, f"--lambda={value}")
    assert f"lambda: expected a finite number, found {value}" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["detect", "b", "a"], "the following arguments are required: -o/--output"),
        (["merge", "b", "-o", "x"], "the following arguments are required: ADAPTER"),
        (
            ["detect", "b", "a", "-o", "x", "--top-k", "some"],
            "argument --top-k: expected a count like 10 or a share like 0.1, found 'some'",
        ),
        (["merge", "b", "a", "-o", "x", "--lambda", "much"], "argument --lambda: invalid float value: 'much'"),
        (["merge", "b", "a", "-o", "x", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["detect", "b", "a", "-o", "x", "--lambda", "1"], "unrecognized arguments: --lambda 1"),
    ],
)
def test_usage(argv: list[str], words: str) -> None:
    done = server().run(*argv)
    assert (done.code, done.out, done.calls) == (2, "", [])
    first, *more, last = done.err.splitlines()
    assert words in last
    assert re.match(r"streamer( \w+)?: error: ", last)
    assert first.startswith("usage: streamer")
    assert all(line.startswith("  ") for line in more), done.err
    assert "\\n" not in done.err


def test_usage_quotes_what_it_was_given_in_one_line() -> None:
    done = server().run("fly\x1b[2J\nhigh")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("streamer: error: argument COMMAND: invalid choice: ")
    assert "\x1b" not in done.err


@pytest.mark.parametrize("command", ["inspect", "detect", "mitigate", "merge", "report", "demo"])
def test_help_says_what_exit_codes_mean(command: str) -> None:
    done = server().run(command, "--help")
    assert (done.code, done.told) == (0, "")
    for words in ("2 usage", "5 locked by another run", "8 input changed during the run", "128+N stopped by signal N",
                  "--json", "--quiet"):  # fmt: skip
        assert words in done.out
    assert command in server().run("--help").out


def test_the_parser_needs_nothing_heavy() -> None:
    """So that --help and a wrong option answer at once."""
    code = (
        "import sys, streamer.cli.main as m; m.build_parser().format_help(); "
        "print(sorted({'torch', 'numpy', 'scipy', 'safetensors', 'tqdm', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Outcome]]:
    """Every command with --json, on one job: base, adapter, findings, and how each ended."""
    home = tmp_path_factory.mktemp("said")
    base, adapter = helpers.three_shards(home)
    findings = home / "findings.safetensors"
    runs = {
        "inspect base": server().run("inspect", base, "--json"),
        "inspect": server().run("inspect", base, adapter, "--json"),
        "detect": server().run("detect", base, adapter, "-o", findings, "--json"),
        "report": server().run("report", findings, "--json"),
    }
    for command in ("merge", "mitigate"):
        runs[command] = server().run(command, base, adapter, "-o", home / command, "--findings", findings,
                                     "--lambda", "0.5", "--json")  # fmt: skip
    return base, adapter, findings, runs


def test_json_is_one_object_on_a_silent_terminal(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    for name, done in said[3].items():
        assert (done.code, done.told) == (0, ""), name
        assert isinstance(json.loads(done.out), dict)


def test_json_of_findings(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    base, _, _, runs = said
    detected, reported = json.loads(runs["detect"].out), json.loads(runs["report"].out)
    for tree in (detected, reported):
        assert tree["schema"] == "streamer.findings/1"
        assert tree.keys() >= {"base", "adapter", "options", "totals", "matrices"}
        assert tree["options"] == {"top_k": 10, "threshold_epsilon": 0.5, "solver": "auto", "max_memory": None}
        assert tree["totals"].keys() >= {"matrices", "intruders", "certified", "escalated", "seconds"}
        assert tree["totals"]["matrices"] == len(tree["matrices"]) == 9
        assert tree["totals"]["intruders"] == sum(len(m["intruders"]) for m in tree["matrices"]) >= 9
        assert [m["tensor"] for m in tree["matrices"]] == [
            name
            for shard in sorted(base.glob("*.safetensors"))
            for name in tensors_in_order(shard)
            if not name.endswith(("layernorm.weight", "counter"))
        ]
        for m in tree["matrices"]:
            assert m.keys() >= {"tensor", "module", "shape", "dtype", "rank", "scale", "solver", "singular_values",
                                "similarity_low", "similarity_high", "intruders", "certified", "seconds", "delta_norm",
                                "intruder_energy"}  # fmt: skip
            assert m["tensor"] == m["module"] + ".weight"
            assert (m["dtype"], m["rank"], m["scale"]) == ("BF16", 4, 1.0)
            assert len(m["singular_values"]) == len(m["similarity_low"]) == len(m["similarity_high"]) == 10
            assert m["singular_values"] == sorted(m["singular_values"], reverse=True)
            for j in range(10):
                assert 0 <= m["similarity_low"][j] <= m["similarity_high"][j] <= 1
            assert 0 <= m["intruder_energy"] <= 1
    assert all(m["seconds"] > 0 for m in detected["matrices"])
    assert all(m["seconds"] is None for m in reported["matrices"])  # a file holds no times
    assert (detected.pop("output"), detected.pop("state")) == (str(said[2]), "written")
    for tree in (detected, reported):
        tree["totals"].pop("seconds")
        for m in tree["matrices"]:
            m.pop("seconds")
    assert detected == reported


def tensors_in_order(file: Path) -> list[str]:
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize("command", ["merge", "mitigate"])
def test_json_of_what_was_written(said: tuple[Path, Path, Path, dict[str, Outcome]], command: str) -> None:
    tree = json.loads(said[3][command].out)
    out = Path(tree["output"])
    assert (tree["schema"], tree["command"], tree["lambda"]) == ("streamer.output/2", command, 0.5)
    assert tree["state"] == "written"
    assert (tree["method"], tree["scale"]) == ("paper", "all")
    digests = tree_digest(out)
    assert {f["file"]: f["sha256"] for f in tree["files"]} == {k: v for k, v in digests.items() if k != "streamer.json"}
    assert all(f["bytes"] == (out / f["file"]).stat().st_size for f in tree["files"])
    assert tree["totals"]["bytes"] == sum(f["bytes"] for f in tree["files"])
    assert len(tree["matrices"]) == tree["totals"]["matrices"] == tree["totals"]["changed"] == 9
    for m in tree["matrices"]:
        assert m.keys() >= {"tensor", "module", "intruders", "delta_norm", "delta_norm_after", "dropped"}
        assert 0 < m["delta_norm_after"] < m["delta_norm"]
        assert 0 <= m["dropped"] < 1
    assert (tree["totals"]["dropped_max"] > 0) == (command == "mitigate")
    assert 0 < tree["totals"]["equal_norm_shrink"] < 1
    stands = json.loads((out / "streamer.json").read_text())
    assert tree == {**stands, "output": str(out), "state": "written"}


def test_json_of_a_plan(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    tree = json.loads(said[3]["inspect"].out)
    assert tree["totals"]["matrices"] == 9
    assert tree["totals"]["largest_matrix_bytes"] == 2 * 48 * 96
    assert {m["matched"] for m in tree["matrices"]} == {"exact"}
    (rule,) = tree["names"]
    assert (rule["rule"], rule["modules"], rule["why"]) == ("exact", 9, "the module's own name")
    assert rule["tensor"] == f"{rule['module']}.weight"
    assert json.loads(said[3]["inspect base"].out)["totals"]["tensors"] == 15


def test_tables_for_people(said: tuple[Path, Path, Path, dict[str, Outcome]], tmp_path: Path) -> None:
    base, adapter, findings, _ = said
    runs = [
        (("inspect", base), "model-00002-of-00003.safetensors"),
        (("inspect", base, adapter), "9 matrices of 15 tensors"),
        (("inspect", base, adapter), "9 matched by exact: the module's own name"),
        (("report", findings), "of 9 matrices (top_k=10, epsilon=0.5)"),
        (("detect", base, adapter, "-o", tmp_path / "f.safetensors"), "of 9 matrices (top_k=10, epsilon=0.5)"),
        (("merge", base, adapter, "-o", tmp_path / "m"), f"wrote {tmp_path / 'm'}: 8 files"),
        (("mitigate", base, adapter, "-o", tmp_path / "a"), "back-projection dropped at most"),
        (
            ("merge", base, adapter, "-o", tmp_path / "d", "--dry-run"),
            f"dry run: would write {tmp_path / 'd'}: 8 files",
        ),
    ]
    for argv, words in runs:
        done = server().run(*argv)
        assert (done.code, done.told) == (0, "")
        assert words in " ".join(done.out.split())  # lines break where a path is long
        with pytest.raises(json.JSONDecodeError):
            json.loads(done.out)


def test_a_shrunk_adapter_has_no_intruders_to_count(job: tuple[Path, Path], tmp_path: Path) -> None:
    """What is scaled is each matrix as a whole: a table that said how many intruders were would say 0 of each."""
    several = tmp_path / "several"
    several.mkdir()
    for name in ("one", "two"):
        shutil.copytree(job[1], several / name)
    for command, adapter in (("merge", job[1]), ("mitigate", job[1]), ("merge", several)):
        options = ("--method", "shrink", "--lambda", "0.5")
        done = server().run(command, job[0], adapter, "-o", tmp_path / f"{command}-{adapter.name}", *options)
        assert done.code == 0, done.err
        assert "scaled" not in done.out + done.last
        assert "9 of 9 matrices mitigated, each as a whole" in done.out or adapter == several
        assert "18 of 18 matrices changed, 16 files" in done.last or adapter != several


def test_quiet_leaves_warnings_and_twice_says_nothing(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 1}}))
    findings = tmp_path / "f.safetensors"
    runs = [
        ("inspect", base, adapter),
        ("inspect", base),
        ("detect", base, adapter, "-o", findings),
        ("report", findings),
        ("merge", base, adapter, "-o", tmp_path / "m"),
        ("merge", base, adapter, "-o", tmp_path / "m"),
        ("mitigate", base, adapter, "-o", tmp_path / "a"),
        ("merge", base, adapter, "-o", tmp_path / "d", "--dry-run"),
    ]
    for argv in runs:
        for option in ("--quiet", "-q"):
            done = server().run(*argv, option)
            assert (done.code, done.out, done.last) == (0, "", ""), argv
            assert (
                re.fullmatch(r"streamer: warning: [^\n]*total_size says 1, [^\n]*\n", done.err) or argv[0] == "report"
            )
        for options in (["-qq"], ["--quiet", "-q"]):
            done = server().run(*argv, *options)
            assert (done.code, done.out, done.err, done.last) == (0, "", "", ""), argv
    refused = server().run("merge", base, adapter, "-o", base, "-qq")
    assert refused.code == 4
    assert refused.err.count("\n") == 1  # an error is told all the same


@pytest.mark.parametrize("command", ["inspect", "detect", "merge", "mitigate"])
def test_a_warning_is_told_once(job: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter = job
    index = base / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    right = tree["metadata"]["total_size"]
    index.write_text(json.dumps(tree | {"metadata": {"total_size": 1}}))
    out = () if command == "inspect" else ("-o", tmp_path / "out.safetensors")
    done = server().run(command, base, adapter, *out)
    assert done.code == 0
    assert done.told == (
        f"streamer: warning: {index}: total_size says 1, the shards hold {right} bytes; the output's will be right\n"
    )
    if command == "merge":
        assert json.loads((tmp_path / "out.safetensors" / index.name).read_text())["metadata"]["total_size"] == right


def test_a_reader_that_leaves_is_no_fault(said: tuple[Path, Path, Path, dict[str, Outcome]]) -> None:
    closed = "r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    done = server().run("report", said[2], "--json", before=closed)
    assert (done.code, done.told) == (0, "")


def test_bars_on_a_terminal_only(said: tuple[Path, Path, Path, dict[str, Outcome]], tmp_path: Path) -> None:
    """A real terminal on stderr gets bars and a whole screen back; stdout stays a clean object."""
    base, adapter, _, _ = said
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    argv = ["merge", base, adapter, "-o", tmp_path / "out", "--json"]
    with subprocess.Popen([sys.executable, "-m", "streamer", *map(str, argv)], env=ENV,
                          stdout=subprocess.PIPE, stderr=theirs, text=True) as process:  # fmt: skip
        os.close(theirs)
        drawn = b""
        try:
            while piece := os.read(ours, 65536):
                drawn += piece
        except OSError:  # Linux says EIO when the other side has closed
            pass
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert json.loads(out)["command"] == "merge"
    assert b"detect" in drawn
    assert b"write" in drawn
    assert b"% |" in drawn
    assert re.search(rb"\r\x1b\[Kstreamer: merge: [^\r\n]* in [^\r\n]* s\r\n\Z", drawn)


def test_threads_and_io_do_not_matter_for_what_is_found(
    said: tuple[Path, Path, Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    base, adapter, findings, _ = said
    done = server().run(
        "detect", base, adapter, "-o", tmp_path / "f.safetensors", "--io", "pread", "--threads", "1", "--device", "cpu"
    )
    assert (done.code, done.told) == (0, "")
    assert (tmp_path / "f.safetensors").read_bytes() == findings.read_bytes()
