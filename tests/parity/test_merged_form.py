"""`merge --dtype` and `--max-shard-size`, against what transformers and PEFT write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from causal_models import EXPERTS, make_adapter, make_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import streamer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZE = 12_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 base and an adapter that also saves its head."""
    home = tmp_path_factory.mktemp("form")
    cls = make_base("llama", home / "base")
    make_adapter(
        cls, home / "base", home / "adapter", ["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    return home / "base", home / "adapter"


def merge(base: Path, adapter: Path, output: Path, **options: object) -> Path:
    merged = streamer.merge_with_reduced_intruder_dimensions
    merged(base, adapter, output, mitigation_lambda=1, **options)  # type: ignore[call-overload]
    return output


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_model_that_transformers_saves(
    inputs: tuple[Path, Path], tmp_path: Path, dtype: str
) -> None:
    base, adapter = inputs
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), adapter
    ).merge_and_unload()
    theirs.to(DTYPES[dtype]).save_pretrained(tmp_path / "theirs", max_shard_size=SIZE)
    ours = merge(base, adapter, tmp_path / "ours", dtype=dtype, max_shard_size=SIZE)
    wanted = tensors(tmp_path / "theirs")
    found = tensors(ours)
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in wanted.items()
    }
    for name, value in wanted.items():
        # PEFT sums in another order: a value may round to a neighbour.
        torch.testing.assert_close(
            found[name], value, rtol=torch.finfo(DTYPES[dtype]).eps, atol=1e-7, msg=name
        )
        if not {"q_proj", "down_proj"} & {*name.split(".")}:
            assert torch.equal(found[name], value), name
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    files = sorted(ours.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) >= 3
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    for file in files:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= SIZE or len(sizes) == 1
    opened = LlamaForCausalLM.from_pretrained(ours, dtype="auto")
    assert opened.dtype == DTYPES[dtype]
    assert streamer.verify_output(ours, base, adapter, sample="all")["totals"]["not_compared"] == 0


def test_one_file_needs_no_index(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    sharded = merge(*inputs, tmp_path / "sharded", max_shard_size="12kB")
    joined = merge(sharded, inputs[1], tmp_path / "joined", max_shard_size="5GB")
    assert [path.name for path in joined.glob("model*")] == ["model.safetensors"]


def test_keeps_what_the_base_stores_wider(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    mixed = merge(*inputs, tmp_path / "mixed", dtype="bf16")
    values = load_file(mixed / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"].float() + 2**-20
    save_file(values, mixed / "model.safetensors", {"format": "pt"})
    ours = merge(mixed, inputs[1], tmp_path / "ours", dtype="fp16")
    (note,) = json.loads((ours / "streamer.json").read_text())["notes"]
    assert (
        note
        == "not written in fp16: 1 tensor of quantized weights or stored wider than most, 'model.norm.weight' first"
    )
    found = tensors(ours)
    assert torch.equal(found.pop("model.norm.weight"), values["model.norm.weight"])
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_names_a_tensor_that_overflows(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    large = merge(*inputs, tmp_path / "large", max_shard_size="5GB")
    values = load_file(large / "model.safetensors")
    values["model.norm.weight"][:3] = 7e4
    save_file(values, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        streamer.StreamerError, match=r"'model.norm.weight'.* float16 .* in 3 values or more"
    ):
        merge(large, inputs[1], tmp_path / "out", dtype="fp16")
    merge(large, inputs[1], tmp_path / "wider", dtype="bf16")


def test_trained_tokens_that_overflow_are_named_too(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    large = merge(*inputs, tmp_path / "large", max_shard_size="5GB")
    values = load_file(large / "model.safetensors")
    values["model.embed_tokens.weight"][5] = 7e4
    save_file(values, large / "model.safetensors", {"format": "pt"})
    tokens = make_adapter(
        LlamaForCausalLM,
        large,
        tmp_path / "tokens",
        ["q_proj"],
        trainable_token_indices={"embed_tokens": [1, 2]},
    )
    with pytest.raises(streamer.StreamerError, match=r"'model.embed_tokens.weight'.* float16 "):
        merge(large, tokens, tmp_path / "out", dtype="fp16")


def test_a_tuned_models_config_states_the_dtype(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = merge(*inputs, tmp_path / "tuned", dtype="bf16")
    ours = merge(inputs[0], tuned, tmp_path / "ours", dtype="fp16")
    assert {value.dtype for value in tensors(ours).values()} == {torch.float16}
    assert LlamaForCausalLM.from_pretrained(ours, dtype="auto").dtype == torch.float16


def test_a_mask_stays_in_the_dtype_that_it_has(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = merge(*inputs, tmp_path / "base", max_shard_size="5GB")
    values = load_file(base / "model.safetensors")
    values["model.mask"] = torch.full((4, 4), float("-inf"))
    save_file(values, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(
        tensors(merge(base, inputs[1], tmp_path / "ours", dtype="fp32"))["model.mask"],
        values["model.mask"],
    )


def test_experts_are_not_taken_for_damaged(tmp_path: Path) -> None:
    cls = make_base("mixtral", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], target_parameters=EXPERTS
    )
    merged = merge(tmp_path / "base", adapter, tmp_path / "merged", dtype="bf16")
    with pytest.raises(streamer.StreamerError, match=r"not verified: .* cannot be recomputed"):
        streamer.verify_output(merged, tmp_path / "base", adapter, sample="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "five"}, "max_shard_size: expected a size like"),
        ({"max_shard_size": 0}, "max_shard_size: expected a size from 1 byte"),
        ({"max_shard_size": "0.4B"}, "max_shard_size: expected a size from 1 byte"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_refuses_other_forms(
    inputs: tuple[Path, Path], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge(*inputs, tmp_path / "out", **options)


def test_resumes_in_the_same_form_only(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*inputs, tmp_path / "out", dtype="bf16")
    with pytest.raises(FileExistsError):
        merge(*inputs, tmp_path / "out", dtype="fp16")
