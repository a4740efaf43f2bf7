"""Maps of bases: their second moments are those of what transformers' own model multiplies its parameters with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized
import torch
import zoo
from causal_models import ADAPTERS, CAUSAL, make_base
from fitted import energy_form
from pairs import make_pair
from quantized_cases import decoded_base
from seeds import vary
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from verified import lines

import streamer
from streamer.plan.plan import make_plan
from streamer.streaming import values
from streamer.streaming.readers import ParameterReader

IDS = [*torch.randint(3, 64, (12, 12), generator=torch.Generator().manual_seed(vary(3)))]

OPERANDS = {
    functional.linear: (1, 0),
    functional.embedding: (1, 0),
    torch.addmm: (2, 1),
    torch.matmul: (1, 0),
    torch.Tensor.matmul: (1, 0),
    torch.Tensor.__matmul__: (1, 0),
}
"""Where a function has the parameter, and what it multiplies or looks up."""


class Operands(TorchFunctionMode):
    """Sums over what a model multiplies each matrix with, and counts of what it looks up, by the matrix's name in the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = dict[int, str]()
        self.sums = dict[str, np.ndarray]()
        for name, parameter in model.named_parameters():
            for e, matrix in enumerate(parameter if parameter.ndim == 3 else [parameter]):
                self.names[matrix.data_ptr()] = f"{name}[{e}]" if parameter.ndim == 3 else name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parameter, operand = OPERANDS.get(func, (0, 0))
        name = self.names.get(args[parameter].data_ptr()) if parameter else None
        if name is not None:
            x = args[operand]
            looked_up = func is functional.embedding
            rows = (
                torch.eye(len(args[parameter])).double()[x.flatten()]
                if looked_up
                else x.reshape(-1, x.shape[-1])
            )
            key = name + " (looked up)" * looked_up
            rows = rows.double().numpy()
            self.sums[key] = self.sums.get(key, 0) + rows.T @ rows
        return func(*args, **(kwargs or {}))


def moments(model: Any, texts: Iterable[torch.Tensor] = IDS) -> dict[str, np.ndarray]:
    """Means over all tokens, by the name of the matrix in the model."""
    with torch.no_grad(), Operands(model) as operands:
        for ids in texts:
            model(input_ids=ids[None])
    return {name: own / sum(map(len, texts)) for name, own in operands.sums.items()}


ON_DISK = {
    "mixtral": ("mlp.gate.", "block_sparse_moe.gate."),
    "gpt-neox": ("lm_head.", "embed_out."),
}
"""Parts of names that are others in files."""


def expected_of(name: str, cls: Any, base: Path) -> dict[str, np.ndarray]:
    """Moments of a base's matrices in float64."""
    model = cls.from_pretrained(base, dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"  # grouped products take no float64
    return {key.replace(*ON_DISK.get(name, ("", ""))): own for key, own in moments(model).items()}


def mapped(base: Path, place: Path, vectors: int = 512) -> streamer.InputMap:
    np.save(place / "g.npy", torch.stack(IDS).numpy())
    return streamer.map_inputs(
        base, general=place / "g.npy", vectors=vectors, on_event=lambda event: None
    )


def assert_alike(made: streamer.InputMap, expected: dict[str, np.ndarray]) -> None:
    """Test whether a map holds these moments, and says of all others that it lacks them."""
    for name, C in expected.items():
        found = made.find(name.removesuffix(" (looked up)"), len(C))
        if found is None:
            assert name in made.facts["lacking"]
            continue
        assert found.trace == pytest.approx(np.trace(C), rel=1e-5)
        assert found.tokens == sum(map(len, IDS))
        if found.vectors is not None:
            largest = np.linalg.eigvalsh(C)[::-1]
            np.testing.assert_allclose(found.values, largest, atol=2e-5 * largest[0])
        # Vectors are rounded to bfloat16.
        np.testing.assert_allclose(energy_form(found), C, atol=2e-2 * np.abs(C).max(), err_msg=name)
    assert all(
        {*one.names} & {name.removesuffix(" (looked up)") for name in expected}
        for one in made.inputs
    )


MAPPED = [
    "llama", "llama-tied", "gpt2", "gemma2", "gemma", "phi3", "opt", "bloom", "gpt-neox", "falcon", "qwen3-moe", "mixtral",
    "deepseek-v3", "gemma3n", "gpt-oss",
]  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_maps_of_architectures(name: str, tmp_path: Path) -> None:
    if name not in CAUSAL:
        pytest.skip("this transformers lacks it")
    cls = make_base(name, tmp_path / "base")
    made = mapped(tmp_path / "base", tmp_path)
    assert_alike(made, expected_of(name, cls, tmp_path / "base"))
    # Run twice a layer, and in another dtype.
    assert all(
        "altup.modality_router" in one or "mlp.gate." in one for one in made.facts["lacking"]
    )


# As `ADAPTERS`: those whose deltas have factors, on layers that PEFT wraps one by one.
KINDS = [
    "saved head and norms",
    "saved embedding, tied",
    "LoRA on a tied head",
    "LoRA on a tied embedding",
    "LoRA's own biases",
    "embeddings of positions",
]


@pytest.mark.parametrize("kind", [*KINDS, "experts, one tensor each", "experts, stacked", "router"])
def test_maps_of_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = ADAPTERS[kind]
    _, base, adapter = make_pair(name, tmp_path, targets, **{"lora_alpha": 4, **options})
    made = mapped(base, tmp_path)
    plan = make_plan(base, adapter)
    lacking = [t.tensor for t in plan.targets if made.find(t.tensor, t.module.shape[1]) is None]
    assert {*lacking} <= {*made.facts["lacking"]} | {t.tensor for t in plan.targets if t.pieces}
    assert len(lacking) < len(plan.targets)
    assert not lacking or "experts" in kind or kind == "router"
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", map=made, on_event=lambda e: None
    )
    made.save(tmp_path / "m.safetensors")
    found = lines(tmp_path / "out", base, adapter, sample="all", map=tmp_path / "m.safetensors")
    apart = (
        kind == "experts, one tensor each"
    )  # which of the factors are which parameter's, only a stack tells
    assert "not verified: 16 matrices cannot be recomputed" in found[0] if apart else found == []


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_matrices_are_read_a_few_rows_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that several matrices form, and a stack of experts, of which none is read whole."""
    monkeypatch.setattr(values, "READ_BYTES", 1000)
    most = 0
    blocks = values.Values.blocks

    def measured(self: values.Values, *args: Any) -> Any:
        nonlocal most
        for block in blocks(self, *args):
            most = max(most, block[2].nbytes)
            yield block

    monkeypatch.setattr(values.Values, "blocks", measured)
    whole = list[str]()
    read = ParameterReader.read

    def recorded(self: ParameterReader) -> torch.Tensor:
        whole.extend([self.name] if len(self.shape) > 1 else [])
        return read(self)

    monkeypatch.setattr(ParameterReader, "read", recorded)
    cls = make_base(name, tmp_path / "base")
    assert_alike(mapped(tmp_path / "base", tmp_path), expected_of(name, cls, tmp_path / "base"))
    assert (0 < most <= 1000, whole) == (True, [])


@pytest.mark.parametrize("encoding", ["fp8-blocks", "nf4", "gptq"])
def test_maps_of_quantized_bases(encoding: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Inputs are those of the decoded base."""
    made = quantized.MAKERS[encoding](tmp_path / "base", plain[0])
    found, expected = (
        mapped(base, tmp_path)
        for base in (made.base, decoded_base(tmp_path / "decoded", plain[0], made))
    )
    assert [one.names for one in found.inputs] == [one.names for one in expected.inputs]
    for one, other in zip(found.inputs, expected.inputs, strict=True):
        torch.testing.assert_close(
            one.values, other.values, rtol=0, atol=2e-5 * float(other.values.max())
        )


POSITIONS = {
    "BartForCausalLM": "model.decoder.embed_positions", "BertLMHeadModel": "bert.embeddings.position_embeddings",
    "BioGptForCausalLM": "biogpt.embed_positions", "ElectraForCausalLM": "electra.embeddings.position_embeddings",
    "GPT2LMHeadModel": "transformer.wpe", "GPTBigCodeForCausalLM": "transformer.wpe", "GPTNeoForCausalLM": "transformer.wpe",
    "OPTForCausalLM": "model.decoder.embed_positions", "OpenAIGPTLMHeadModel": "transformer.positions_embed",
    "RobertaForCausalLM": "roberta.embeddings.position_embeddings", "XLMWithLMHeadModel": "transformer.position_embeddings",
}  # fmt: skip
"""Embeddings of positions, which some classes look up for each sequence and others once for all."""


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_counted_in_each_sequence(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    table = f"{POSITIONS[name]}.weight"
    model.save_pretrained(tmp_path)
    expected = moments(model)[f"{table} (looked up)"]
    found = mapped(tmp_path, tmp_path).find(table, len(expected))
    assert found is not None
    np.testing.assert_allclose(energy_form(found), expected, atol=1e-12)
    assert found.trace == pytest.approx(1)


def test_modules_with_the_same_inputs_share_them(tmp_path: Path) -> None:
    make_base("llama", tmp_path / "base")
    made = mapped(tmp_path / "base", tmp_path, 3)
    shared = {one.names for one in made.inputs if len(one.names) > 1}
    layer = "model.layers.0."
    assert tuple(f"{layer}self_attn.{name}_proj.weight" for name in "qkv") in shared
    assert tuple(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")) in shared
    assert {len(one.values) for one in made.inputs if one.vectors is not None} == {3}
    assert made.facts["lacking"] == []
