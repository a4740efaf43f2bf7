"""PEFT adapter folders: names, scales by PEFT's own rules, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import helpers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.config_rules import config_refusals
from streamer.adapters.modules import LoraModule
from streamer.adapters.reader import open_adapter
from streamer.adapters.tensor_names import classify, normalize
from streamer.errors import FormatError, InputError, MismatchError, StreamerError, UnsupportedError

MODULE = "model.layers.0.self_attn.q_proj"


def factors(rank: int = 4, m: int = 6, n: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g)


def one_module(home: Path, name: str = MODULE, rank: int = 4, **config: object) -> LoraModule:
    """The module of an adapter of one module, as it is read."""
    config = {"r": 4, "alpha": 8, **config}
    adapter = open_adapter(helpers.write_adapter(home, {name: factors(rank)}, **config))  # type: ignore[arg-type]
    return adapter.modules[name]


def write_raw(home: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder with these tensors, named as they are."""
    home.mkdir(exist_ok=True)
    save_file(tensors, home / "adapter_model.safetensors")
    (home / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return home


# Scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"alpha": 7.5}, 4, 7.5 / 4),
        ({"alpha_pattern": {"q_proj": 1}}, 4, 0.25),
        ({"alpha_pattern": {"k_proj": 1}}, 4, 2.0),
        ({"alpha_pattern": {"proj": 1}}, 4, 2.0),  # a key is a whole component, or several
        ({"alpha_pattern": {"self_attn.q_proj": 1, "q_proj": 2}}, 4, 0.25),
        ({"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 1}}, 4, 0.5),  # the first in the config's order
        ({"alpha_pattern": {".*attn.*": 2}}, 4, 0.5),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 2}}, 4, 0.5),
        ({"alpha_pattern": {MODULE: 2}}, 4, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 4, 2.0),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}}, 2, 0.5),
        ({"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}, 9, 1 / 3),
        ({"rank_pattern": {}, "alpha_pattern": None}, 4, 2.0),
    ],
)
def test_scale(tmp_path: Path, config: dict, rank: int, scale: float) -> None:
    module = one_module(tmp_path, rank=rank, **config)
    assert (module.rank, module.shape) == (rank, (6, 5))
    assert module.scaling == pytest.approx(scale, rel=1e-15)


def test_what_peft_reads_is_what_we_read(tmp_path: Path) -> None:
    """A model with patterns, saved by PEFT: every module's rank and scale are those of its layer."""
    import peft
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 4)}) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k"], use_rslora=True,
                             rank_pattern={"layers.1.q": 2, "q": 4}, alpha_pattern={"k": 7, r"layers\.2\..*": 9})  # fmt: skip
    model = peft.get_peft_model(Tiny(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        ours = adapter.modules[name]
        assert (ours.rank, ours.scaling) == (layer.r["default"], layer.scaling["default"])
        delta = ours.delta(adapter.tensors, None)
        torch.testing.assert_close(delta.L @ delta.R.T, layer.get_delta_weight("default"))
    assert len({(m.rank, m.scaling) for m in adapter.modules.values()}) >= 4


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (
            {"r": 8},
            MismatchError,
            "expected rank 8 by the config, found 4 rows in lora_A; config and weights are not of one adapter",
        ),
        ({"rank_pattern": {"q_proj": 2}}, MismatchError, "expected rank 2 by the config, found 4 rows"),
        ({"alpha": 0}, FormatError, "its alpha gives a scale of 0.0; expected a finite number, not 0"),
        (
            {"alpha": "8"},
            FormatError,
            "lora_alpha of module 'model.layers.0.self_attn.q_proj': expected a number, found '8'",
        ),
        ({"alpha": True}, FormatError, "expected a number, found True"),
        ({"alpha_pattern": {"q_proj": None}}, FormatError, "expected a number, found None"),
        ({"alpha_pattern": ["q_proj"]}, FormatError, "alpha_pattern: expected an object, found list"),
        ({"alpha": 10**400}, FormatError, "is out of range"),
        ({"rank_pattern": {"a{99999999999}": 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(" * 5000: 4}}, FormatError, "is not a regular expression"),
        ({"rank_pattern": {"(": 4}}, FormatError, "pattern '(' is not a regular expression"),
    ],
)
def test_a_config_that_is_wrong(tmp_path: Path, config: dict, error: type[StreamerError], words: str) -> None:
    with pytest.raises(error) as e:
        one_module(tmp_path, **config)
    assert str(e.value).startswith(str(tmp_path / "adapter_config.json"))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_alpha_must_be_stated(tmp_path: Path) -> None:
    write_raw(tmp_path, dict(zip((f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), factors(), strict=True)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"lora_alpha of module .* expected a number, found None"):
        open_adapter(tmp_path)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias",
                                        "init_lora_weights", "use_dora", "modules_to_save", "new_key", "use_new"]),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3),
                                    max_leaves=5)))  # fmt: skip
def test_any_config_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, config: dict) -> None:
    """No config, however odd, ends in anything but an adapter or one line."""
    home = tmp_path_factory.mktemp("a")
    A, B = factors()
    write_raw(home, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}, **config)
    said = ""
    try:
        scale = open_adapter(home).modules[MODULE].scaling
    except InputError as e:
        said = str(e)
    assert str(home) in said if said else math.isfinite(scale)
    assert "\n" not in said


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.my-adapter_2.weight",
        "{}.lora_{}.weight",
        "module.base_model.model.{}.lora_{}.weight",
        "_orig_mod.base_model.model.{}.lora_{}.weight",
        "base_model.model._orig_mod.{}.lora_{}.weight",
        "_fsdp_wrapped_module.base_model.model.{}.lora_{}.weight",
        "module._orig_mod.base_model.model.{}.lora_{}.default.weight",
        "_fsdp_wrapped_module._orig_mod.base_model.model.{}.lora_{}.weight",
    ],
)
def test_name_variants(tmp_path: Path, template: str) -> None:
    A, B = factors()
    adapter = open_adapter(write_raw(tmp_path, {template.format(MODULE, "A"): A, template.format(MODULE, "B"): B}))
    assert list(adapter.modules) == [MODULE]
    module = adapter.modules[MODULE]
    assert (module.a, module.b) == (template.format(MODULE, "A"), template.format(MODULE, "B"))
    delta = module.delta(adapter.tensors, None)
    torch.testing.assert_close(delta.L @ delta.R.T, 2.0 * B @ A)


def test_wrappers_inside_a_path() -> None:
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module"):
        name = f"base_model.model.model.layers.0.{wrapper}.self_attn.{wrapper}.q_proj.lora_A.weight"
        assert normalize(name) == f"{MODULE}.lora_A.weight"
    # These only look like wrappers.
    assert normalize("model.my_orig_mod.x.lora_A.weight") == "model.my_orig_mod.x.lora_A.weight"
    assert normalize("model.module.x.lora_A.weight") == "model.module.x.lora_A.weight"


@given(st.text(max_size=40))
def test_every_name_has_a_rule(name: str) -> None:
    rule, match = classify(normalize(name))
    assert rule.refusal or rule.role == "original" or match["module"]


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("base_model.model.{}.hada_w1_a", (6, 5), "another method's tensors"),
        ("base_model.model.{}.lora_E", (4, 1), "another method's tensors"),
        ("prompt_embeddings", (3, 5), "a tensor of unknown meaning"),
    ],
)
def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...], reason: str) -> None:
    name = name.format(MODULE)
    A, B = factors()
    path = write_raw(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, name: torch.zeros(shape)})
    with pytest.raises(UnsupportedError) as e:
        open_adapter(path)
    assert str(e.value) == (f"{path / 'adapter_model.safetensors'}: refused: not supported: 1 × {reason}, {name!r} first; "
                            "merge such an adapter with PEFT instead")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "role", "of"),
    [
        ("base_model.model.{}.lora_B.bias", "lora_bias", f"{MODULE}.bias"),
        ("base_model.model.{}.lora_B.default.bias", "lora_bias", f"{MODULE}.bias"),
        ("base_model.model.{}.bias", "saved", f"{MODULE}.bias"),
        ("base_model.model.{}.base_layer.bias", "saved", f"{MODULE}.bias"),
        ("base_model.model.lm_head.weight", "saved", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "saved", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "saved", "lm_head.weight"),
        ("base_model.model.head.modules_to_save.default.0.dense.weight", "saved", "head.0.dense.weight"),
        ("base_model.model.lm_head.original_module.weight", "original", None),
        ("base_model.model.{}.base_layer.weight", "saved", f"{MODULE}.weight"),
        ("base_model.model.embed.token_adapter.base_layer.weight", "saved", "embed.weight"),
        ("base_model.model.embed.token_adapter.trainable_tokens_original.default", "original", None),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta", "tokens", "embed.weight"),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta.default", "tokens", "embed.weight"),
    ],
)
def test_what_is_carried_along(tmp_path: Path, name: str, role: str, of: str | None) -> None:
    A, B = factors()
    name = name.format(MODULE)
    path = write_raw(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, name: torch.zeros(2, 5)},
                     trainable_token_indices=[4, 1])  # fmt: skip
    (carried,) = open_adapter(path).carried
    assert (carried.role, carried.source) == (role, name)
    if of is not None:
        assert carried.name == of
    assert carried.scaling == (2.0 if role == "lora_bias" else 1.0)
    assert carried.indices == ((4, 1) if role == "tokens" else ())


def test_all_reasons_are_counted(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path, {"a.hada_w1_a": torch.ones(4, 3), "a.hada_w1_b": torch.ones(8, 4), "prompt": torch.ones(3)}
    )
    with pytest.raises(UnsupportedError) as e:
        open_adapter(path)
    assert "2 × another method's tensors, 'a.hada_w1_a' first" in str(e.value)
    assert "1 × a tensor of unknown meaning, 'prompt' first" in str(e.value)


@pytest.mark.parametrize(
    ("names", "a", "b", "shape", "form", "weight"),
    [
        (("lora_A.weight", "lora_B.weight"), (4, 5), (6, 4), (6, 5), "linear", (6, 5)),
        (("lora_embedding_A", "lora_embedding_B"), (4, 50), (6, 4), (6, 50), "embedding", (50, 6)),
        (("lora_embedding_A.default", "lora_embedding_B.default"), (4, 50), (6, 4), (6, 50), "embedding", (50, 6)),
        (("lora_A.weight", "lora_B.weight"), (4, 5, 3), (6, 4, 1), (6, 15), "convolution", (6, 5, 3)),
        (("lora_A.weight", "lora_B.weight"), (4, 5, 3, 2), (6, 4, 1, 1), (6, 30), "convolution", (6, 5, 3, 2)),
        (("lora_A.weight", "lora_B.weight"), (4, 5, 1, 1, 2), (6, 4, 1, 1, 1), (6, 10), "convolution", (6, 5, 1, 1, 2)),
    ],
)
def test_forms(
    tmp_path: Path, names: tuple[str, str], a: tuple, b: tuple, shape: tuple, form: str, weight: tuple
) -> None:
    A, B = torch.randn(a), torch.randn(b)
    adapter = open_adapter(write_raw(tmp_path, {f"x.{names[0]}": A, f"x.{names[1]}": B}))
    module = adapter.modules["x"]
    assert (module.shape, module.form, module.weight, module.rank) == (shape, form, weight, 4)
    torch.testing.assert_close(module.delta(adapter.tensors, None).dense(), 2 * B.flatten(1) @ A.flatten(1))


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (
            {"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 2, 1)},
            UnsupportedError,
            "LoRA on a convolution with 2 groups",
        ),
        (
            {"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 4, 3)},
            UnsupportedError,
            "is not a convolution of kernel size 1",
        ),
        ({"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 4)}, FormatError, "are not of one layer"),
        ({"lora_embedding_A": (4, 5), "lora_B.weight": (6, 4)}, FormatError, "are not of one layer"),
        ({"lora_A.weight": (4,), "lora_B.weight": (6,)}, FormatError, "are not of one layer"),
    ],
)
def test_factors_of_no_form(tmp_path: Path, tensors: dict, error: type, words: str) -> None:
    path = write_raw(tmp_path, {f"x.{n}": torch.ones(s) for n, s in tensors.items()})
    with pytest.raises(error) as e:
        open_adapter(path)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x.lora_A.weight": (4, 5)}, "module 'x' has lora_A but not its partner; save the adapter again"),
        ({"x.lora_B.weight": (4, 5)}, "module 'x' has lora_B but not its partner"),
        (
            {"x.lora_A.weight": (4, 5), "x.lora_B.weight": (6, 3)},
            "lora_B [6, 3] and lora_A [4, 5] do not multiply; save",
        ),
        ({"x.lora_A.weight": (0, 5), "x.lora_B.weight": (6, 0)}, "lora_B [6, 0] and lora_A [0, 5] do not multiply"),
        ({"x.lora_A.weight": (4, 0), "x.lora_B.weight": (6, 4)}, "do not multiply"),
        (
            {"x.lora_A.weight": (4, 5), "x.lora_B.weight": (6, 4), "x.lora_A.second.weight": (4, 5)},
            "are the same factor of one module; save one adapter at a time",
        ),
        ({}, "expected lora_A and lora_B tensors, found none; is this the adapter?"),
    ],
)
def test_factors_that_do_not_pair_up(tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: str) -> None:
    path = write_raw(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(InputError) as e:
        open_adapter(path)
    assert str(e.value).startswith(f"{path / 'adapter_model.safetensors'}: ")
    assert words in str(e.value)


def test_factors_that_are_no_numbers(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path, {"x.lora_A.weight": torch.ones(4, 5, dtype=torch.int8), "x.lora_B.weight": torch.ones(6, 4)}
    )
    with pytest.raises(UnsupportedError, match=r"tensor 'x.lora_A.weight': dtype I8 is not one of"):
        open_adapter(path)


# Kinds, by config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "residual-base"),
        ({"init_lora_weights": "PiSSA"}, "residual-base"),
        ({"init_lora_weights": "loftq"}, "residual-base"),
        ({"init_lora_weights": "corda"}, "residual-base"),
        ({"init_lora_weights": "lora_ga"}, "residual-base"),
        ({"init_lora_weights": "tomorrow"}, "unknown initialisation"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"k": 1}}, "Arrow"),
        ({"use_bdlora": {"x": 1}}, "BD-LoRA"),
        ({"kasa_config": {"x": 1}}, "KaSA"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"peft_type": "HRA"}, "HRA adapter"),
        ({"peft_type": ["LORA"]}, "adapter: its change of the weights is not known here"),
        ({"peft_type": "BOFT", "boft_n_butterfly_factor": 2}, "BOFT: boft_n_butterfly_factor=2"),
        ({"peft_type": "OFT", "fan_in_fan_out": True}, "OFT: fan_in_fan_out=true"),
        ({"peft_type": "LOKR", "use_tomorrow": True}, "unknown variant use_tomorrow=True"),
        ({"use_tomorrow": True}, "unknown variant use_tomorrow=True"),
        ({"tomorrow_config": {"x": 1}}, "unknown variant tomorrow_config"),
    ],
)
def test_refused_by_config(config: dict, kind: str) -> None:
    reasons = config_refusals(AdapterConfig(config, Path("adapter_config.json")))
    assert len(reasons) == 1
    assert kind in reasons[0]


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": init} for init in (True, False, None, "gaussian", "eva", "orthogonal")
    ] + [{"loftq_config": {}}, {"bias": None}, {"use_tomorrow": False}, {"tomorrow_config": None}, {"a_note": "x"},
         {"target_modules": ["q"], "layers_to_transform": [1], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}],
)  # fmt: skip
def test_taken_by_config(config: dict) -> None:
    assert config_refusals(AdapterConfig(config, Path("adapter_config.json"))) == []


# Identity -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    for name in ("b", "a"):
        helpers.write_adapter(tmp_path / name, {MODULE: factors()}, r=4)
    with pytest.raises(InputError, match=r"found none; name one of the adapters in it: 'a', 'b'$"):
        open_adapter(tmp_path)


def test_identity_is_of_contents_not_of_places(tmp_path: Path) -> None:
    adapter = helpers.write_adapter(tmp_path / "a", {MODULE: factors()}, r=4, base_model_name_or_path="org/model")
    same = helpers.write_adapter(tmp_path / "elsewhere", {MODULE: factors()}, r=4, base_model_name_or_path="org/model")
    identity = open_adapter(adapter).identity()
    assert identity == open_adapter(same).identity()
    assert identity["base_model_name_or_path"] == "org/model"
    assert str(tmp_path) not in json.dumps(identity)
    file = same / "adapter_model.safetensors"
    tensors = load_file(file)
    last = list(tensors)[-1]
    tensors[last] = tensors[last].clone()
    tensors[last][-1, -1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert open_adapter(same).identity()["weights_sha256"] != identity["weights_sha256"]
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert open_adapter(adapter).identity()["config_sha256"] != identity["config_sha256"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_factors_of_every_dtype(tmp_path: Path, dtype: torch.dtype, io: str) -> None:
    A, B = (t.to(dtype) for t in factors())
    adapter = open_adapter(write_raw(tmp_path, {"x.lora_A.weight": A, "x.lora_B.weight": B}), io)  # type: ignore[arg-type]
    delta = adapter.modules["x"].delta(adapter.tensors, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert delta.L.dtype == delta.R.dtype == wide
    torch.testing.assert_close(delta.R, A.to(wide).T, rtol=0, atol=0)
    torch.testing.assert_close(delta.L, 2 * B.to(wide), rtol=0, atol=0)


OTHER = {
    "kohya": ("lora_unet_down_blocks_0_attn.lora_down.weight", "last.safetensors", "the format of kohya-ss"),
    "diffusers": ("unet.down_blocks.0.attn.to_q.lora_A.weight", "pytorch_lora_weights.safetensors", "the format of diffusers"),
    "diffusers of old": ("unet.mid_block.attn.processor.to_q_lora.down.weight", "pytorch_lora_weights.safetensors", "of diffusers"),
    "MLX": ("model.layers.0.self_attn.q_proj.lora_a", "adapters.safetensors", "the format of MLX"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_a_lora_of_another_library_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    tensor, file, words = OTHER[case]
    save_file({tensor: torch.zeros(4, 5)}, tmp_path / file)
    if case == "MLX":
        (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(UnsupportedError, match="a LoRA in the format of") as e:
            open_adapter(path)
        assert words in str(e.value)
    (tmp_path / file).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    if case != "diffusers":  # whose names are PEFT's, but for what they begin with
        with pytest.raises(UnsupportedError, match="a LoRA in the format of"):
            open_adapter(tmp_path)
