"""Adapters of diffusers pipelines: which tensors form a module, its scaling, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_file
from pipelines import CONV, FC1, KOHYA, LORA, SHAPES, TO_Q, factors, lora, scaling, write_pipeline
from safetensors.torch import load_file, save_file

import streamer
from streamer.adapters.adapter import open_adapter
from streamer.adapters.adapter_config import Stated
from streamer.errors import (
    FormatError,
    InputError,
    MismatchError,
    OutputExistsError,
    StorageError,
    UnsupportedError,
)
from streamer.plan.plan import make_plan

Tensors = dict[str, torch.Tensor]
FORMS = ("kohya", "metadata", "finetrainers", "plain")
TO_Q_NAME = KOHYA[f"unet.{TO_Q}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_merged_pipeline_is_the_base_plus_scaled_products(tmp_path: Path, form: str) -> None:
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora(form)
    save_file(tensors, tmp_path / LORA, metadata)
    streamer.merge_with_reduced_intruder_dimensions(
        base, tmp_path / LORA, tmp_path / "out", mitigation_lambda=1
    )
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        before = load_file(base / file)
        after = load_file(tmp_path / "out" / file)
        assert list(before) == list(after)
        for name, W0 in before.items():
            module = f"{file.partition('/')[0]}.{name.removesuffix('.weight')}".replace(
                "text_encoder.", "text_encoder.text_model."
            )
            expected = W0.double().numpy()
            if module in SHAPES:
                A, B = (t.double().flatten(1).numpy() for t in factors(form, tensors, module))
                expected = expected + scaling(form, module) * (B @ A).reshape(expected.shape)
            np.testing.assert_allclose(after[name].double().numpy(), expected, rtol=0, atol=2e-6)
    written = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert {name for name in written if "16" in name or name.endswith(".bin")} == {
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    for name in ("vae/diffusion_pytorch_model.safetensors", "model_index.json", "unet/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_mitigated_adapter_has_the_form_of_the_original(tmp_path: Path, form: str) -> None:
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora(form)
    (tmp_path / "lora").mkdir()
    save_file(
        tensors, tmp_path / "lora" / "mine.safetensors", {**metadata, "sshs_model_hash": "abc"}
    )
    for lam, adapter in ((1, tmp_path / "lora"), (0.5, tmp_path / "lora" / "mine.safetensors")):
        out = tmp_path / f"out {lam}"
        streamer.reduce_intruder_dimension(
            base, adapter, out, method="shrink", mitigation_lambda=lam
        )
        after = load_file(out / "mine.safetensors")
        assert {name: t.shape for name, t in after.items()} == {
            name: t.shape for name, t in tensors.items()
        }
        assert all(
            torch.equal(after[name], tensors[name])
            for name in after
            if lam == 1 or name.endswith("alpha")
        )
        assert not (out / "adapter_config.json").exists()
        found = open_adapter(out).file.header.metadata
        assert found.items() >= metadata.items()
        assert "sshs_model_hash" not in found, "of the original factors"
        for module in SHAPES:
            A, B = (t.double().flatten(1) for t in factors(form, tensors, module))
            mitigated_A, mitigated_B = (t.double().flatten(1) for t in factors(form, after, module))
            torch.testing.assert_close(
                mitigated_B @ mitigated_A, lam * (B @ A), rtol=1e-5, atol=1e-5
            )
    assert (
        make_plan(base, tmp_path / "lora").adapter_identity
        == make_plan(base, tmp_path / "lora" / "mine.safetensors").adapter_identity
    )


def test_keys_of_the_metadata_may_be_ignored(tmp_path: Path) -> None:
    tensors, metadata = lora("metadata")
    config = json.loads(metadata["lora_adapter_metadata"]) | {"unet.from_the_future": 1}
    save_file(tensors, tmp_path / LORA, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(UnsupportedError, match="unknown key 'from_the_future'"):
        open_adapter(tmp_path / LORA)
    adapter = open_adapter(tmp_path / LORA, stated=Stated(ignore_keys=["from_the_future"]))
    assert adapter.identity()["ignored_keys"] == ["from_the_future"]
    assert "'from_the_future' of pytorch_lora_weights.safetensors is ignored" in adapter.notes[0]


REFUSED: dict[str, tuple[Callable[[Tensors], object], str, type[InputError], str]] = {
    "a middle factor": (lambda t: t.update({"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)}), "kohya",
                        UnsupportedError, "'lora_unet_conv_in.lora_mid.weight' not supported in kohya's form, only the factors of LoRA"),
    "DoRA": (lambda t: t.update({f"{TO_Q_NAME}.dora_scale": torch.ones(6, 1)}), "kohya", UnsupportedError, "dora_scale' not supported"),
    "DoRA without DoRA's config": (lambda t: t.update({f"unet.{TO_Q}.lora_magnitude_vector": torch.ones(6)}), "metadata",
                                   MismatchError, "use_dora"),
    "DoRA of a text encoder": (lambda t: t.update({"text_encoder.a.lora_magnitude_vector": torch.ones(8)}), "plain", UnsupportedError,
                               "'text_encoder.a.lora_magnitude_vector' not supported"),
    "integers": (lambda t: t.update({f"{TO_Q_NAME}.lora_up.weight": torch.ones(6, 2).int()}), "kohya", UnsupportedError, "dtype I32"),
    "LoHa": (lambda t: t.update({f"{TO_Q_NAME}.hada_w1_a": torch.ones(6, 1)}), "kohya", UnsupportedError, "hada_w1_a' not supported"),
    "a bias": (lambda t: t.update({f"unet.{TO_Q}.lora_B.bias": torch.ones(6)}), "plain", UnsupportedError, "lora_B.bias' not supported"),
    "T5": (lambda t: t.update({"lora_te3_encoder_0.alpha": torch.ones(())}), "kohya", UnsupportedError, "text_encoder_2"),
    "alphas of some": (lambda t: t.pop(f"{TO_Q_NAME}.alpha"), "kohya", FormatError, "2 of its 3 modules have an alpha"),
    "alphas and a config": (lambda t: t.update({f"{m}.alpha": torch.ones(()) for m in KOHYA}), "metadata", MismatchError, "both alphas"),
    "two alphas": (lambda t: t.update({f"{TO_Q_NAME}.alpha": torch.ones(2)}), "kohya", FormatError, r"found F32 of shape \[2\]"),
    "an alpha of zero": (lambda t: t.update({f"{TO_Q_NAME}.alpha": torch.zeros(())}), "kohya", FormatError, "other than 0"),
    "a scaling elsewhere": (lambda t: None, "plain, config beside", UnsupportedError, "diffusers ignores adapter_config.json beside it"),
    "half a module": (lambda t: t.pop(f"{TO_Q_NAME}.lora_up.weight"), "kohya", FormatError, "no factor B"),
    "another rank": (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.ones(1, 5), f"unet.{TO_Q}.lora_B.weight": torch.ones(6, 1)}),
                     "metadata", MismatchError, "expected rank 2 by the config, found 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, form, error, words = REFUSED[case]
    tensors, metadata = lora(form)
    change(tensors)
    save_file(tensors, tmp_path / LORA, metadata)
    if "beside" in form:  # then the directory is PEFT's
        (tmp_path / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'
        )
    for path in (tmp_path, tmp_path / LORA)["beside" in form :]:
        with pytest.raises(error, match=words):
            open_adapter(path)


def test_kohya_names_of_a_transformer_are_its_own(tmp_path: Path) -> None:
    """Flux alone has those of its original code."""
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora("kohya")
    (base / "unet").rename(base / "transformer")
    (base / "transformer" / "config.json").write_text(
        '{"_class_name": "QwenImageTransformer2DModel"}'
    )
    save_file(tensors, tmp_path / LORA, metadata)
    found = {target.tensor for target in make_plan(base, tmp_path / LORA).targets}
    assert found == {
        f"transformer.{TO_Q}.weight",
        f"transformer.{CONV}.weight",
        f"text_encoder.{FC1}.weight",
    }


MISFITS = {
    "another name": (
        "kohya",
        {"lora_unet_mid_block_attentions_9_to_q": (6, 5)},
        "has no tensor of a known name in the base",
    ),
    "no component": (
        "kohya",
        {"lora_te2_text_model_encoder": (6, 5)},
        "has no tensor of a known name in the base",
    ),
    "another shape": ("plain", {f"unet.{TO_Q}": (6, 4)}, "expected shape"),
    "a linear layer as a convolution": ("plain", {f"unet.{TO_Q}": (6, 5, 1, 1)}, "expected shape"),
    "names of SDXL": (
        "kohya",
        {"lora_unet_input_blocks_0_0": (4, 3, 3, 3)},
        "no tensor of a known name",
    ),
    "two names of one": (
        "kohya",
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 6)},
        "both change",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_modules_without_a_unique_tensor_are_refused_by_name(tmp_path: Path, case: str) -> None:
    form, names, words = MISFITS[case]
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora(form)
    for name, shape in names.items():
        A = torch.ones(2, *shape[1:])
        B = torch.ones(shape[0], 2, *(1 for _ in shape[2:]))
        kohya = {
            f"{name}.lora_down.weight": A,
            f"{name}.lora_up.weight": B,
            f"{name}.alpha": torch.ones(()),
        }
        tensors |= (
            kohya if form == "kohya" else {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        )
    save_file(tensors, tmp_path / LORA, metadata)
    with pytest.raises(MismatchError, match=re.escape(next(iter(names)))) as e:
        make_plan(base, tmp_path / LORA)
    assert words in str(e.value)


def test_pipelines_and_their_adapters_need_each_other(tmp_path: Path) -> None:
    base, (model, adapter) = write_pipeline(tmp_path / "base"), one_file(tmp_path)
    save_file(lora("plain")[0], tmp_path / LORA)
    with pytest.raises(
        MismatchError, match="is not an adapter of a diffusers pipeline; expected names of"
    ):
        make_plan(base, adapter)
    with pytest.raises(
        MismatchError,
        match=r"is an adapter of a diffusers pipeline; expected model_index\.json and",
    ):
        make_plan(model, tmp_path / LORA)


def test_alphas_in_diffusers_form_are_of_flux_alone(tmp_path: Path) -> None:
    tensors = lora("plain")[0] | {f"{module}.alpha": torch.ones(()) for module in KOHYA}
    save_file(tensors, tmp_path / LORA)
    with pytest.raises(UnsupportedError, match=r"\.alpha': diffusers loads alphas"):
        make_plan(write_pipeline(tmp_path / "base"), tmp_path / LORA)


def test_a_quantized_component_is_refused(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    save_file(lora("plain")[0], tmp_path / LORA)
    (base / "unet" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "bitsandbytes"}}'
    )
    with pytest.raises(UnsupportedError, match="is quantized, which is not supported in pipelines"):
        make_plan(base, tmp_path / LORA)


def test_old_weights_in_an_output_are_refused(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    (base / "loras").mkdir()
    save_file(lora("kohya")[0], base / "loras" / "mine.safetensors")
    old = tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    old.parent.mkdir(parents=True)
    save_file({"of.old": torch.zeros(1)}, old)
    options = {"method": "shrink", "mitigation_lambda": 0.5, "overwrite": True}
    with pytest.raises(OutputExistsError, match="fp16"):
        streamer.merge_with_reduced_intruder_dimensions(
            base, base / "loras" / "mine.safetensors", tmp_path / "out", **options
        )
    old.unlink()
    streamer.merge_with_reduced_intruder_dimensions(
        base, base / "loras" / "mine.safetensors", tmp_path / "out", **options
    )
    assert not (tmp_path / "out" / "loras" / "mine.safetensors").exists(), (
        "the adapter is no part of the merged pipeline"
    )


def test_texts_do_not_run_through_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora("metadata")
    save_file(tensors, tmp_path / LORA, metadata)
    (tmp_path / "t.txt").write_text("some words\n")
    texts = dict.fromkeys(("general", "task"), tmp_path / "t.txt")
    with pytest.raises(
        UnsupportedError,
        match="is a diffusers pipeline; evaluate, repair and map need a language model",
    ):
        streamer.evaluate_variants(base, tmp_path / LORA, **texts)
    with pytest.raises(UnsupportedError, match="is a diffusers pipeline; evaluate"):
        streamer.repair_adapter(base, tmp_path / LORA, tmp_path / "out", **texts)


def test_a_quantized_matrix_of_a_component_is_refused(tmp_path: Path) -> None:
    base, (tensors, metadata) = write_pipeline(tmp_path / "base"), lora("metadata")
    save_file(tensors, tmp_path / LORA, metadata)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    stored[f"{TO_Q}.weight"] = stored[f"{TO_Q}.weight"].to(torch.float8_e4m3fn)
    stored[f"{TO_Q}.weight_scale"] = torch.ones(())
    save_file(stored, file)
    with pytest.raises(UnsupportedError, match="unet: is quantized"):
        make_plan(base, tmp_path / LORA)


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no file here whose first byte cannot be read"
)
@pytest.mark.parametrize("name", [LORA, "model.safetensors"])
def test_a_file_that_the_disk_cannot_read_is_not_refused_as_another_format(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(
        StorageError, match=f"{name}: cannot read: Input/output error; run the same command again"
    ):
        open_adapter(tmp_path)
