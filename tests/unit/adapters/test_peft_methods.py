"""Methods other than LoRA: what fits a weight, what does not, and the identities of their formulas. Parity with PEFT is in `parity`."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import block_diag

import streamer
from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.modules import PEFT_METHODS, MethodInputs
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.plan.plan import make_plan

Q = "layers.0.q"


def job(
    home: Path, peft_type: str, tensors: dict[str, tuple[int, ...]], **config: object
) -> tuple[Path, Path]:
    """A weight (12, 8), and an adapter of a method on it."""
    base = helpers.write_sharded(home / "base", [{f"{Q}.weight": torch.randn(12, 8)}])
    (home / "adapter").mkdir()
    save_file(
        {f"base_model.model.{n}": torch.randn(s) for n, s in tensors.items()},
        home / "adapter" / "adapter_model.safetensors",
    )
    scale = {"alpha": 4} if peft_type in ("LOHA", "LOKR") else {}
    (home / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": peft_type, "r": 2, **scale, **config})
    )
    return base, home / "adapter"


LOHA = {
    f"{Q}.hada_w1_a": (12, 2),
    f"{Q}.hada_w1_b": (2, 8),
    f"{Q}.hada_w2_a": (12, 2),
    f"{Q}.hada_w2_b": (2, 8),
}
OFT = {"use_cayley_neumann": False}


@pytest.mark.parametrize("solver", ["dense", "certified"])
def test_a_module_that_was_pruned_away(tmp_path: Path, solver: str) -> None:
    """AdaLoRA ends with rank 0 where it spends its budget elsewhere: nothing is added there."""
    shapes = {f"{Q}.lora_A": (0, 8), f"{Q}.lora_B": (12, 0), f"{Q}.lora_E": (0, 1)}
    base, adapter = job(tmp_path, "ADALORA", shapes, init_r=6)
    W0 = load_file(base / "model-00001-of-00001.safetensors")[f"{Q}.weight"]
    (found,) = streamer.detect_intruder_dimensions(base, adapter, top_k=3, solver=solver)
    assert found.detection.intruders == ()
    torch.testing.assert_close(
        torch.tensor(found.detection.singular_values), torch.linalg.svdvals(W0)[:3]
    )
    for options in ({"method": "paper"}, {"method": "project"}, {"method": "shrink"}):
        ((_, merged),) = streamer.iter_merged(base, adapter, top_k=3, solver=solver, **options)  # type: ignore[arg-type]
        assert torch.equal(merged, W0)
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", to_lora=2, top_k=3, solver=solver
    )
    assert not load_file(tmp_path / "out" / "adapter_model.safetensors")[
        f"base_model.model.{Q}.lora_B.weight"
    ].any()


BROKEN = {
    "a tensor is missing": (
        "LOHA", {n: s for n, s in LOHA.items() if "w2_b" not in n}, {}, MismatchError, "expected what fits hada_w1_a [12, 2]"
    ),
    "of another width": ("LOHA", {**LOHA, f"{Q}.hada_w1_b": (2, 9)}, {}, MismatchError, "hada_w1_b [2, 9]"),
    "other dimensions": ("LOKR", {f"{Q}.lokr_w1": (3,), f"{Q}.lokr_w2": (4, 4)}, {}, MismatchError, "lokr_w1 [3]"),
    "products": ("LOKR", {f"{Q}.lokr_w1": (3, 2), f"{Q}.lokr_w2": (4, 5)}, {}, MismatchError, "lokr_w2 [4, 5]"),
    "no diagonal": ("ADALORA", {f"{Q}.lora_A": (3, 8), f"{Q}.lora_B": (12, 3)}, {}, MismatchError, "lora_A [3, 8]"),
    "no projections": ("VERA", {f"{Q}.vera_lambda_d": (5,), f"{Q}.vera_lambda_b": (12,)}, {}, MismatchError, "vera_lambda_d [5]"),
    "no blocks": ("OFT", {f"{Q}.oft_R.weight": (2, 7)}, OFT, MismatchError, "oft_R [2, 7]"),
    "blocks that do not tile": ("OFT", {f"{Q}.oft_R.weight": (3, 6)}, OFT, MismatchError, "oft_R [3, 6]"),
    "two butterfly factors": ("BOFT", {f"{Q}.boft_R": (2, 2, 4, 4), f"{Q}.boft_s": (12, 1)}, {}, MismatchError, "boft_R [2, 2, 4, 4]"),
    "LoRA's factors": ("LOHA", {**LOHA, f"{Q}.lora_A.weight": (2, 8)}, {}, UnsupportedError, "lora_A.weight' of another method"),
    "another's tensors": ("OFT", {**LOHA, f"{Q}.oft_R.weight": (2, 6)}, OFT, UnsupportedError, "and 3 more of another method"),
    "nothing": ("LOKR", {}, {}, InputError, "expected LoKr tensors, found none; is this the adapter?"),
    "no scale": ("LOHA", LOHA, {"alpha": 0}, FormatError, "its alpha gives a scale of 0.0"),
    "no end": ("OFT", {f"{Q}.oft_R.weight": (2, 6)}, {"num_cayley_neumann_terms": 10**30}, UnsupportedError, "from 1 to 1000"),
    "no rank": ("LOHA", LOHA, {"r": "x"}, FormatError, "r of module 'layers.0.q': expected a number, found 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_of_other_methods_are_refused(tmp_path: Path, case: str) -> None:
    peft_type, tensors, config, error, words = BROKEN[case]
    base, adapter = job(tmp_path, peft_type, tensors, **config)
    with pytest.raises(error) as e:
        make_plan(base, adapter)
    assert words in str(e.value)


def parts(
    tensors: dict[str, torch.Tensor], shape: tuple[int, int], **config: object
) -> MethodInputs:
    return MethodInputs(tensors, 1.0, AdapterConfig(config, Path("adapter_config.json")), shape)


@pytest.mark.parametrize("role", ["oft_R", "oft_embedding_R"])
def test_a_rotation_keeps_the_singular_values(role: str) -> None:
    """Along the input, or of an embedding along the output: W0 Rᵀ and Rᵀ W0 with R orthogonal."""
    W0 = torch.randn(12, 8, dtype=torch.float64)
    length = 12 if role == "oft_embedding_R" else 8
    R = torch.randn(length // 4, 6, dtype=torch.float64)
    W1 = W0 + PEFT_METHODS["OFT"].delta(parts({role: R}, (12, 8)), W0).dense()
    torch.testing.assert_close(torch.linalg.svdvals(W1), torch.linalg.svdvals(W0))
    assert (W1 - W0).abs().max() > 0.1
    kept = W1 @ W1.T - W0 @ W0.T if role == "oft_R" else W1.T @ W1 - W0.T @ W0
    assert kept.abs().max() < 1e-9


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 6, 8])
def test_the_neumann_series_comes_near_the_exact_rotation(terms: int) -> None:
    """With a series, PEFT turns by R = (I + Q)(I − Q)⁻¹; without one, by (I − Q)(I + Q)⁻¹, which is the rotation of −Q.

    R = I + 2Q + 2Q² + …, and R + I = 2(I − Q)⁻¹. One or two terms of R leave out 2Qᵗ + 2Qᵗ⁺¹ + … = Qᵗ(R + I). From four terms on, PEFT
    halves the last one, Qᵗ⁻¹: what it leaves out is Qᵗ⁻¹ + 2Qᵗ + … = Qᵗ⁻¹R, whose norm is ‖Q‖ᵗ⁻¹. It computes four terms for three.
    """
    W0 = torch.randn(12, 8, dtype=torch.float64)
    vectors = 0.02 * torch.randn(2, 6, dtype=torch.float64)
    exact = PEFT_METHODS["OFT"].delta(parts({"oft_R": -vectors}, (12, 8)), W0).dense()
    options = {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
    series = PEFT_METHODS["OFT"].delta(parts({"oft_R": vectors}, (12, 8), **options), W0).dense()

    blocks = np.zeros((2, 4, 4))
    blocks[:, *np.triu_indices(4, 1)] = vectors.numpy()
    skew = block_diag(*(blocks - blocks.transpose(0, 2, 1)))
    eye = np.eye(8)
    R = (eye + skew) @ np.linalg.inv(eye - skew)
    power = {1: 1, 2: 2, 3: 3}.get(terms, terms - 1)
    left_out = np.linalg.matrix_power(skew, power) @ (R + eye if terms < 3 else R)
    # Each entry is a sum of a few rounded products, none larger than ‖W0‖: fewer than 100 roundings in all.
    rounding = 100 * np.finfo(float).eps * np.linalg.norm(W0.numpy(), 2)
    assert np.abs((exact - series).numpy() - W0.numpy() @ left_out.T).max() <= rounding
