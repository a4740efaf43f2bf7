"""Pipelines merged with an adapter compute what diffusers computes with the adapter loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers_pipelines import PIPELINES, answers, opened, trained
from pairs import merge, mitigate
from safetensors.torch import load_file, save_file

pytest.importorskip(
    "diffusers", reason="pipelines are compared with diffusers, which the test extra installs"
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

SDXL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj": "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_0_out_layers_3": "up_blocks.1.resnets.1.conv2",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
"""Names in the original code of SDXL → in diffusers', for two blocks of two layers."""

FLUX = {
    "double_blocks_0_img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks_0_txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks_0_img_attn_proj": ("attn.to_out.0",),
    "double_blocks_0_txt_attn_proj": ("attn.to_add_out",),
    "double_blocks_0_img_mlp_0": ("ff.net.0.proj",),
    "double_blocks_0_img_mlp_2": ("ff.net.2",),
    "double_blocks_0_txt_mlp_0": ("ff_context.net.0.proj",),
    "double_blocks_0_txt_mlp_2": ("ff_context.net.2",),
    "double_blocks_0_img_mod_lin": ("norm1.linear",),
    "double_blocks_0_txt_mod_lin": ("norm1_context.linear",),
    "single_blocks_0_linear2": ("proj_out",),
    "single_blocks_0_modulation_lin": ("norm.linear",),
}
"""Names in the original code of Flux → the layers that hold the rows in diffusers'."""

LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


@pytest.fixture(autouse=True)
def _older_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for a version of PEFT that may not exist for this Python; diffusers does not."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory of each pipeline, made once."""
    home = tmp_path_factory.mktemp("pipelines")

    def base(kind: str) -> Path:
        if not (home / kind).exists():
            PIPELINES[kind]().save_pretrained(home / kind)
        return home / kind

    return base


def check(
    base: Path, adapter: Path, out: Path, oracle: Path | None = None, changed: int = 1
) -> None:
    """Merge, and compare with the adapter, or with the same adapter in a form that diffusers reads, loaded by diffusers."""
    merge(base, adapter, out, 1)
    pipe = opened(base)
    before = answers(pipe)
    pipe.load_lora_weights(oracle or adapter)
    expected = answers(pipe)
    found = answers(opened(out))
    assert (
        sum(float((a - b).abs().max()) > 1e-2 for a, b in zip(before, expected, strict=True))
        >= changed
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stated", [True, False], ids=["config in the metadata", "no config"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_adapters_that_diffusers_saves(
    bases: Callable[[str], Path], tmp_path: Path, kind: str, stated: bool
) -> None:
    from diffusers.training_utils import _collate_lora_metadata

    pipe = opened(bases(kind))
    layers = trained(pipe)
    adapted = {
        name.removesuffix("_lora_layers"): getattr(pipe, name.removesuffix("_lora_layers"))
        for name in layers
    }
    more = _collate_lora_metadata(adapted) if stated else {}
    pipe.save_lora_weights(tmp_path / "lora", **layers, **more)
    check(bases(kind), tmp_path / "lora", tmp_path / "merged", changed=len(layers))


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_dora_of_a_pipeline_is_merged(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    pipe = opened(bases(kind))
    layers = trained(pipe, use_dora=True)
    pipe.save_lora_weights(tmp_path / "lora", **layers)
    assert any(
        "magnitude" in name
        for name in load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    )
    check(bases(kind), tmp_path / "lora", tmp_path / "merged", changed=len(layers))


def test_a_mitigated_adapter_opens_in_diffusers(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = opened(bases("sd"))
    pipe.save_lora_weights(tmp_path / "lora", **trained(pipe))
    mitigate(bases("sd"), tmp_path / "lora", tmp_path / "mitigated", 0.2)
    name = "pytorch_lora_weights.safetensors"
    before = load_file(tmp_path / "lora" / name)
    after = load_file(tmp_path / "mitigated" / name)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    check(bases("sd"), tmp_path / "mitigated", tmp_path / "merged", changed=2)


def factors(shape: tuple[int, ...], rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors of a weight of this shape."""
    a = torch.randn(rank, *shape[1:])
    b = torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
    return a * 0.1, b


def kohya(names: Mapping[str, tuple[int, ...]], alpha: float | None = 3) -> dict[str, torch.Tensor]:
    """An adapter by kohya's names → the shapes of the weights."""
    found = {}
    for name, shape in names.items():
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = factors(shape)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def text_names(base: Path, component: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """Kohya's names of the layers of CLIP."""
    found = {}
    for name, tensor in load_file(base / component / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            module = name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_")
            found[f"{prefix}text_model_{module}"] = tuple(tensor.shape)
    return found


def shapes(base: Path, component: str) -> dict[str, tuple[int, ...]]:
    tensors = load_file(base / component / "diffusion_pytorch_model.safetensors")
    return {
        name.removesuffix(".weight"): tuple(t.shape)
        for name, t in tensors.items()
        if name.endswith(".weight") and t.ndim > 1
    }


@pytest.mark.parametrize("alpha", [3, None])
def test_kohya_names_of_stable_diffusion(
    bases: Callable[[str], Path], tmp_path: Path, alpha: float | None
) -> None:
    base = bases("sd")
    names = {
        f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes(base, "unet").items()
    }
    tensors = kohya(names | text_names(base, "text_encoder", "lora_te_"), alpha)
    save_file(tensors, tmp_path / "kohya.safetensors")
    check(base, tmp_path / "kohya.safetensors", tmp_path / "merged", changed=2)


def test_kohya_names_of_sdxl(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("sdxl")
    known = shapes(base, "unet")
    names = {f"lora_unet_{name}": known[module] for name, module in SDXL.items()}
    names |= text_names(base, "text_encoder", "lora_te1_") | text_names(
        base, "text_encoder_2", "lora_te2_"
    )
    save_file(kohya(names), tmp_path / "kohya.safetensors")
    check(base, tmp_path / "kohya.safetensors", tmp_path / "merged", changed=3)


def flux_shape(
    known: Mapping[str, tuple[int, ...]], blocks: str, layers: tuple[str, ...]
) -> tuple[int, int]:
    held = [known[f"{blocks}.0.{layer}"] for layer in layers]
    return sum(m for m, _ in held), held[0][1]


def test_kohya_names_of_flux(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("flux")
    known = shapes(base, "transformer")
    names = {}
    for name, layers in FLUX.items():
        blocks = "transformer_blocks" if name.startswith("double") else "single_transformer_blocks"
        names[f"lora_unet_{name}"] = flux_shape(known, blocks, layers)
    tensors = kohya(names | text_names(base, "text_encoder", "lora_te1_"))
    save_file(tensors, tmp_path / "kohya.safetensors")
    check(base, tmp_path / "kohya.safetensors", tmp_path / "merged", changed=2)


def test_flux_in_one_layer_for_all_that_reads_the_input(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Diffusers splits ``linear1`` at Flux's own sizes only: the oracle for a small model has it split, in the order seen there."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    down, up = factors((21504, 8))
    own = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": down,
        "lora_unet_single_blocks_0_linear1.lora_up.weight": up,
    }
    split = _convert_kohya_flux_lora_to_diffusers(dict(own))
    parts = [
        split[f"transformer.single_transformer_blocks.0.{layer}.lora_B.weight"] for layer in LINEAR1
    ]
    assert torch.equal(torch.cat(parts), up)

    base = bases("flux")
    head = "single_transformer_blocks.0"
    known = shapes(base, "transformer")
    sizes = [known[f"{head}.{layer}"][0] for layer in LINEAR1]
    tensors = kohya(
        {
            "lora_unet_single_blocks_0_linear1": flux_shape(
                known, "single_transformer_blocks", LINEAR1
            )
        }
    )
    save_file(tensors, tmp_path / "kohya.safetensors")
    down, up, _ = tensors.values()
    oracle = {}
    for layer, rows in zip(LINEAR1, up.split(sizes), strict=True):
        oracle[f"transformer.{head}.{layer}.lora_A.weight"] = down * (3 / 4)
        oracle[f"transformer.{head}.{layer}.lora_B.weight"] = rows.contiguous()
    (tmp_path / "oracle").mkdir()
    save_file(
        {k: v.clone() for k, v in oracle.items()},
        tmp_path / "oracle" / "pytorch_lora_weights.safetensors",
    )
    check(base, tmp_path / "kohya.safetensors", tmp_path / "merged", tmp_path / "oracle")
    # Written back, the fused matrix is one again.
    mitigate(base, tmp_path / "kohya.safetensors", tmp_path / "mitigated", 0.2, method="shrink")
    mitigated = load_file(tmp_path / "mitigated" / "kohya.safetensors")
    assert mitigated.keys() == tensors.keys()
    new_down, new_up, _ = (mitigated[name] for name in tensors)
    torch.testing.assert_close(new_up @ new_down, 0.2 * (up @ down), rtol=1e-4, atol=1e-5)


def test_alphas_of_a_flux_adapter(bases: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = opened(bases("flux"))
    pipe.save_lora_weights(tmp_path / "lora", **trained(pipe))
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    for n, name in enumerate([name for name in tensors if name.endswith(".lora_A.weight")]):
        tensors[name.replace(".lora_A.weight", ".alpha")] = torch.tensor(1.0 + n % 3)
    save_file(tensors, file)
    check(bases("flux"), tmp_path / "lora", tmp_path / "merged", changed=2)


def test_a_component_in_shards(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("sd"), base)
    pipe = opened(base)
    shutil.rmtree(base / "unet")
    pipe.unet.save_pretrained(base / "unet", max_shard_size="100KB")
    assert (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    pipe.save_lora_weights(tmp_path / "lora", **trained(pipe))
    check(base, tmp_path / "lora", tmp_path / "merged", changed=2)
