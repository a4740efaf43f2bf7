"""A delta of any kind as a LoRA adapter: the nearest of its rank, and an honest figure of what is left out."""

import json
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import OutputError, StreamerError, UnsupportedError, UsageError
from streamer.linalg.operators import Dense, LowRank
from streamer.output import lora
from streamer.output.lora import truncated

Q = "model.layers.0.q_proj"


def job(home: Path, **config: object) -> tuple[Path, Path]:
    torch.manual_seed(vary(0))
    base = helpers.write_sharded(
        home / "base",
        [{f"{Q}.weight": torch.randn(32, 24), "lm_head.weight": torch.randn(8, 24)}],
        {"model_type": "test", "tie_word_embeddings": False},
    )
    return base, helpers.write_adapter(
        home / "adapter", {Q: helpers.intruding_factors(32, 24, 6)}, r=6, alpha=12, **config
    )


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 280)])
@pytest.mark.parametrize("factored", [True, False])
def test_truncation_is_the_nearest(
    shape: tuple[int, int], factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eckart-Young, by LAPACK and, above so many rows and columns, by the Krylov solver."""
    monkeypatch.setattr(lora, "LAPACK_SIDE", 100)
    p = min(shape)
    sigma = torch.cat([torch.tensor([9.0, 5.0, 4.0, 1.0, 0.5]), torch.full((p - 5,), 1e-3)])
    matrix, expected = (
        helpers.spectrum_matrix(*shape, s) for s in (sigma, sigma * (torch.arange(p) < 4))
    )
    delta: LowRank | Dense = (
        LowRank(matrix, torch.eye(shape[1]).double()) if factored else Dense(matrix.float())
    )
    found = truncated(delta, 4, "x").dense()
    assert (found - expected).norm() < 2e-5 * matrix.norm()


@pytest.mark.parametrize(
    "zero", [Dense(torch.zeros(5, 7)), LowRank(torch.zeros(5, 2), torch.ones(7, 2))]
)
def test_a_delta_of_zero(zero: LowRank | Dense) -> None:
    found = truncated(zero, 3)
    assert found.rank == 3
    assert not found.dense().any()


def test_the_adapter_and_what_it_leaves_out(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    head = torch.randn(8, 24)
    save_file({**load_file(file), "base_model.model.lm_head.weight": head}, file)
    record = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", to_lora=2, method="shrink", mitigation_lambda=0.5
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A, B = (written[f"base_model.model.{Q}.lora_{f}.weight"] for f in "AB")
    assert (A.shape, B.shape, A.dtype) == ((2, 24), (32, 2), torch.float32)
    old = load_file(file)
    delta = (
        0.5
        * 2
        * (
            old[f"base_model.model.{Q}.lora_B.weight"] @ old[f"base_model.model.{Q}.lora_A.weight"]
        ).double()
    )
    S = torch.linalg.svdvals(delta)
    (matrix,) = record["matrices"]
    assert matrix["dropped"] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-5)
    assert matrix["delta_norm_after"] == pytest.approx(float(S[:2].norm()), rel=1e-5)
    assert torch.equal(written["base_model.model.lm_head.weight"], head)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [Q],
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "modules_to_save": ["lm_head"],
    }
    # The same again is done; another rank is another output.
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", to_lora=2, method="shrink", mitigation_lambda=0.5
    )
    with pytest.raises(OutputError):
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "out", to_lora=3, method="shrink", mitigation_lambda=0.5
        )


def test_names_are_without_their_wrappers(tmp_path: Path) -> None:
    """Those of all tensors: PEFT finds none of a compiled model's in one that is not."""
    base, adapter = job(tmp_path, modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = {**load_file(file), "base_model.model.lm_head.weight": torch.randn(8, 24)}
    save_file(
        {
            n.replace("base_model.model.", "base_model.model._orig_mod."): t
            for n, t in tensors.items()
        },
        file,
    )
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", to_lora=6)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("rank", [0, -1, True, 2.0])
def test_a_rank_that_is_none(tmp_path: Path, rank: object) -> None:
    base, adapter = job(tmp_path)
    with pytest.raises(UsageError, match="to_lora: expected a rank from 1"):
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", to_lora=rank)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_a_plain_adapter_cannot_say(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, init_lora_weights="pissa")
    with pytest.raises(
        UnsupportedError,
        match="is relative to a residual base, which a plain config does not say; --to-lora cannot",
    ):
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "out", to_lora=2, base_is_residual=True
        )


def test_a_residual_base_is_part_of_the_findings_identity(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, init_lora_weights="pissa")
    with pytest.raises(
        UnsupportedError, match="or give the residual as the base and pass --base-is-residual"
    ):
        streamer.detect_intruder_dimensions(base, adapter)
    findings = streamer.detect_intruder_dimensions(base, adapter, base_is_residual=True)
    assert findings.adapter["base_is_residual"] is True
    streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "out", findings=findings, base_is_residual=True
    )
    with pytest.raises(StreamerError):
        streamer.merge_with_reduced_intruder_dimensions(
            base, adapter, tmp_path / "merged", findings=findings
        )
