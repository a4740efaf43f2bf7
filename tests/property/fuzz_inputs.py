"""Targets that come from a download: headers, indexes, configs, adapters, quantized bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import intruding_factors, power_law, view, write_adapter, write_sharded
from mutate import Mutator, dump, mutate_json, mutate_safetensors, with_header
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamer.api.intruders import iter_merged
from streamer.api.records import inspection_record
from streamer.cli.tables import inspect_table
from streamer.errors import FormatError, StreamerError
from streamer.output.form import Form
from streamer.output.merged import plan_merged
from streamer.plan.plan import make_plan
from streamer.storage.atomic_file import gather
from streamer.storage.checkpoint import TensorFile, open_checkpoint
from streamer.storage.header import DTYPE_BITS, tensor_nbytes

CPU = torch.device("cpu")


SIZE = 16


NAMES = tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv")


class Trouble(Exception):
    """A wrong answer."""


@dataclass(frozen=True)
class Target:
    """Inputs to begin with, how they are changed, and what is done with them."""

    seeds: list[bytes]
    mutate: Mutator
    run: Callable[[bytes], None]


def small_job(home: Path) -> tuple[Path, Path]:
    """A base of two shards and an adapter with an intruder in each of four modules."""
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    factors = {}
    for i, name in enumerate(NAMES):
        shards[i // 2][f"{name}.weight"] = power_law(SIZE, SIZE, seed=i).bfloat16()
        factors[name] = intruding_factors(SIZE, SIZE, 2, seed=i)
    shards[1]["model.norm.weight"] = torch.ones(SIZE, dtype=torch.bfloat16)
    base = write_sharded(
        home / "base",
        shards,
        {"model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": SIZE},
    )
    return base, write_adapter(home / "adapter", factors, r=2)


def header(home: Path) -> Target:
    """A weights file: taken where the safetensors library takes it, but for two equal names."""
    path = home / "x.safetensors"
    save_file(
        {"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.int64)},
        path,
        metadata={"format": "pt"},
    )
    plain = path.read_bytes()
    every = {
        name: {"dtype": name, "shape": [8], "data_offsets": [8 * i, 8 * i + DTYPE_BITS[name]]}
        for i, name in enumerate(DTYPE_BITS)
    }
    at = 0
    for info in every.values():
        size = info["data_offsets"][1] - info["data_offsets"][0]
        info["data_offsets"] = [at, at + size]
        at += size
    seeds = [
        plain,
        with_header(every, bytes(at)),
        with_header({}, b""),
        with_header({"__metadata__": {}}, b""),
    ]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with safe_open(path, "pt") as f:
                theirs = set(f.keys())
        except (
            SafetensorError,
            OSError,
            ValueError,
        ) as e:  # OSError: a file of no bytes cannot be mapped
            theirs = None
            refused = e
        try:
            file = TensorFile(path)
        except FormatError as e:
            if theirs is not None and "appears twice" not in str(e):
                raise Trouble(f"the library takes it: {e}") from e
            raise
        if theirs is None:
            raise Trouble(f"the library refuses it: {refused}")
        if theirs != file.header.by_name.keys():
            raise Trouble("other names than the library's")
        for info in file.header.tensors:
            if bytes(file.view(info)) != gather(file.chunks(info), info.nbytes):
                raise Trouble("two ways to read differ")
        file.sample()

    return Target(seeds, mutate_safetensors, run)


def index(home: Path) -> Target:
    """A checkpoint's index."""
    base, _ = small_job(home)
    path = base / "model.safetensors.index.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = open_checkpoint(base)
        assert checkpoint.identity
        for name in checkpoint.weight_map:
            view(checkpoint, name)

    return Target([path.read_bytes()], mutate_json, run)


def config(home: Path) -> Target:
    """A model's config."""
    base, adapter = small_job(home)
    path = base / "config.json"
    plain = json.loads(path.read_text())
    more = [
        {
            "text_config": {"hidden_size": SIZE, "tie_word_embeddings": True},
            "tie_word_embeddings": False,
        },
        {
            "model_type": "mixtral",
            "vocab_size": 8,
            "architectures": ["MixtralForCausalLM"],
            "dtype": "float16",
        },
        {
            "model_type": "gpt2",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
        },
        {
            "compression_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {}}},
            }
        },
        {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": -1,
                "modules_to_not_convert": ["x"],
            }
        },
    ]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        use(base, adapter)

    return Target([dump(plain), *(dump(plain | m) for m in more)], mutate_json, run)


def use(base: Path, adapter: Path) -> None:
    """Everything that the commands do with inputs short of writing: the plan and its table, findings, merged tensors, both ways."""
    plan = make_plan(base, adapter)
    inspect_table(inspection_record(plan))
    plan.digest()
    refused = 0
    for dequantize in (False, True):
        try:
            plan_merged(plan, Form(dequantize=dequantize))
        except StreamerError:
            refused += 1
        else:
            for _ in iter_merged(base, adapter, mitigation_lambda=1.0, dequantize=dequantize):
                pass
    if refused == 2:
        plan_merged(plan, Form(dequantize=True))
    for target in plan.targets:
        plan.weights[target.tensor].load().whole(CPU)
        plan.delta(target)


def _described(path: Path, tensors: Any, metadata: Any = None) -> None:
    """A safetensors file of these ``{name: [dtype, shape]}``, with a 64-bit number that fills it as a third; or of bytes given as text."""
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    rest = bytearray()
    if not isinstance(tensors, dict):
        raise FormatError("no tensors")
    for name, what in tensors.items():
        if isinstance(what, str):
            what = what.encode(errors="replace")  # noqa: PLW2901
            entry = {"dtype": "U8", "shape": [len(what)]}
            data = what
        else:
            try:
                dtype, shape, *fill = what
                if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
                    raise ValueError
                size = tensor_nbytes(dtype, shape)
                filled = b"".join(n.to_bytes(8, "little") for n in fill)
            except (TypeError, ValueError, AttributeError, OverflowError):
                raise FormatError("no such tensor") from None
            if size > 1 << 20:
                raise FormatError("too large")
            entry = {"dtype": dtype, "shape": shape}
            data = _values(dtype, size, filled)
        tree[name] = entry | {"data_offsets": [at, at + len(data)]}
        at += len(data)
        rest += data
    path.write_bytes(with_header(tree, bytes(rest)))


def _values(dtype: str, size: int, pattern: bytes) -> bytes:
    """Bytes of a pattern; by default values of about 1 in floating point, and small integers."""
    pattern = pattern or {
        "F32": b"\x9a\x99\x99\x3e",
        "BF16": b"\x9a\x3e",
        "F16": b"\x00\x34",
        "F64": bytes(6) + b"\xd0\x3f",
        "F8_E4M3": b"\x28\x30\xb0",
        "I32": b"\1\0\0\0",
        "I64": b"\1" + bytes(7),
    }.get(dtype, b"\1\2\0")
    return (pattern * (size // len(pattern) + 1))[:size]


def _module(kind: str, r: int = 2) -> dict[str, list[Any]]:
    """The tensors that a method has for a module of (SIZE, SIZE), by what follows its name."""
    n = SIZE
    return {
        "lora": {".lora_A.weight": ["F32", [r, n]], ".lora_B.weight": ["F32", [n, r]]},
        "dora": {
            ".lora_A.weight": ["F32", [r, n]],
            ".lora_B.weight": ["F32", [n, r]],
            ".lora_magnitude_vector": ["F32", [n]],
        },
        "loha": {
            f".hada_w{i}_{ab}": ["F32", [n, r] if ab == "a" else [r, n]]
            for i in (1, 2)
            for ab in "ab"
        },
        "lokr": {
            ".lokr_w1": ["F32", [4, 4]],
            ".lokr_w2_a": ["F32", [4, 1]],
            ".lokr_w2_b": ["F32", [1, 4]],
        },
        "adalora": {
            ".lora_A": ["F32", [r, n]],
            ".lora_B": ["F32", [n, r]],
            ".lora_E": ["F32", [r, 1]],
            ".ranknum": ["F32", []],
        },
        "vera": {".vera_lambda_b": ["F32", [n]], ".vera_lambda_d": ["F32", [r]]},
        "oft": {".oft_R.weight": ["F32", [4, 6]]},
        "boft": {".boft_R": ["F32", [1, 4, 4, 4]], ".boft_s": ["F32", [n, 1]]},
    }[kind]


def _adapter(kind: str, config: Mapping[str, Any], more: Mapping[str, Any] = {}) -> bytes:
    prefix = "base_model.model."
    tensors = {
        f"{prefix}{name}{end}": what for name in NAMES[:2] for end, what in _module(kind).items()
    }
    scale = {
        "lora": "lora_alpha",
        "dora": "lora_alpha",
        "adalora": "lora_alpha",
        "loha": "alpha",
        "lokr": "alpha",
    }.get(kind)
    tree = {"peft_type": "LORA", "r": 2, **({scale: 4} if scale else {}), **config}
    return dump(
        {"config": tree, "tensors": {**tensors, **{f"{prefix}{k}": v for k, v in more.items()}}}
    )


def adapter(home: Path) -> Target:
    """An adapter: its config, and the names, dtypes and shapes of its tensors."""
    base, directory = small_job(home)
    extra = {
        "model.embed_tokens.weight": ["BF16", [12, SIZE]],
        "model.layers.0.mlp.experts.down_proj": ["BF16", [3, SIZE, 8]],
        "lm_head.weight": ["BF16", [12, SIZE]],
        **{f"{name}.bias": ["BF16", [SIZE]] for name in NAMES[:2]},
    }
    plain = {name: ["BF16", [SIZE, SIZE]] for name in (f"{n}.weight" for n in NAMES)}
    (base / "model.safetensors.index.json").unlink()
    for shard in base.glob("*.safetensors"):
        shard.unlink()
    # Of a class whose experts are stacks: how they are stored is not guessed.
    (base / "config.json").write_bytes(
        dump({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    )
    _described(base / "model.safetensors", plain | extra)
    n = SIZE
    r = 2
    experts = {
        "model.layers.0.mlp.experts.lora_A.weight": ["F32", [3 * r, 8]],
        "model.layers.0.mlp.experts.lora_B.weight": ["F32", [n, 3 * r]],
    }
    embedding = {
        "model.embed_tokens.lora_embedding_A": ["F32", [r, 12]],
        "model.embed_tokens.lora_embedding_B": ["F32", [n, r]],
    }
    seeds = [
        _adapter(
            "lora",
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0": 8}, "use_rslora": True},
        ),
        _adapter(
            "lora",
            {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.1"},
            experts,
        ),
        _adapter(
            "lora",
            {"modules_to_save": ["lm_head"], "lora_bias": True},
            {
                "lm_head.weight": ["F32", [12, n]],
                **{f"{name}.lora_B.bias": ["F32", [n]] for name in NAMES[:2]},
            },
        ),
        _adapter(
            "lora",
            {"trainable_token_indices": {"embed_tokens": [1, 3]}},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": ["F32", [2, n]]},
        ),
        _adapter("lora", {"fan_in_fan_out": False, "init_lora_weights": "gaussian"}, embedding),
        _adapter("dora", {"use_dora": True}),
        _adapter("loha", {"peft_type": "LOHA"}),
        _adapter("lokr", {"peft_type": "LOKR"}),
        _adapter("adalora", {"peft_type": "ADALORA", "init_r": 4}),
        _adapter(
            "vera",
            {"peft_type": "VERA", "save_projection": True},
            {"vera_A": ["F32", [r, n]], "vera_B": ["F32", [n, r]]},
        ),
        _adapter(
            "oft",
            {
                "peft_type": "OFT",
                "peft_version": "0.21.2",
                "use_cayley_neumann": True,
                "coft": True,
                "eps": 1e-3,
            },
        ),
        _adapter("boft", {"peft_type": "BOFT", "boft_n_butterfly_factor": 1}),
    ]

    def run(data: bytes) -> None:
        tree = _parsed(data)
        (directory / "adapter_config.json").write_bytes(dump(tree.get("config")))
        _described(directory / "adapter_model.safetensors", tree.get("tensors"))
        use(base, directory)

    return Target(seeds, mutate_json, run)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError("no JSON") from None
    if not isinstance(tree, dict):
        raise FormatError("no tree")
    return tree


def _quantized(
    method: str | None, tensors: Mapping[str, Any], metadata: Any = None, **config: Any
) -> bytes:
    names = {f"{NAMES[0]}{end}": what for end, what in tensors.items()}
    return dump(
        {
            "quantization_config": {"quant_method": method, **config},
            "tensors": names,
            "metadata": metadata,
        }
    )


def _floats(encoding: str, bits: int, size: int, tensors: Mapping[str, Any]) -> bytes:
    """As compressed-tensors states small floats."""
    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": bits,
            "type": "float",
            "group_size": size,
            "symmetric": True,
            "strategy": "tensor_group" if size == 16 else "group",
        },
    }
    return _quantized(
        "compressed-tensors", tensors, format=encoding, config_groups={"group_0": group}
    )


def _torchao(kind: str, data: Mapping[str, Any], **parts: Any) -> bytes:
    stated = {"_type": kind, "_data": data, "_tensor_data_names": [*parts]}
    metadata = {
        f"{NAMES[0]}.weight": json.dumps(stated),
        "tensor_names": json.dumps([f"{NAMES[0]}.weight"]),
    }
    return _quantized(
        "torchao", {f"._weight_{part}": what for part, what in parts.items()}, metadata
    )


def quantized(home: Path) -> Target:
    """A base that stands as codes: its quantization_config, and the dtypes and shapes of codes, scales and tables."""
    base, _ = small_job(home)
    (base / "model.safetensors.index.json").unlink()
    for shard in base.glob("*.safetensors"):
        shard.unlink()
    n = 32
    groups = 2
    directory = write_adapter(home / "one", {NAMES[0]: intruding_factors(n, n, 2)}, r=2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, n]}
    nested = state | {"nested_blocksize": 256, "nested_offset": 0.1, "nested_dtype": "float32"}
    ints = {".scales": ["F16", [groups, n]], ".qzeros": ["I32", [groups, n // 8]]}
    seeds = [
        _quantized(
            "fp8",
            {".weight": ["F8_E4M3", [n, n]], ".weight_scale_inv": ["F32", [2, 2]]},
            weight_block_size=[16, 16],
        ),
        _quantized(
            "fp8",
            {".weight": ["F8_E4M3", [n, n]], ".weight_scale_inv": ["F8_E8M0", [2, 2]]},
            scale_fmt="ue8m0",
        ),
        _quantized(
            "compressed-tensors",
            {
                ".weight": ["F8_E4M3", [n, n]],
                ".weight_scale": ["BF16", [n, 1]],
                ".input_scale": ["F32", []],
            },
        ),
        _quantized(
            "compressed-tensors",
            {
                ".weight": ["I8", [n, n]],
                ".weight_scale": ["BF16", [n, 1]],
                ".weight_zero_point": ["I8", [n, 1], 0],
            },
        ),
        _quantized(
            "compressed-tensors",
            {
                ".weight_packed": ["I32", [n, n // 8]],
                ".weight_scale": ["BF16", [n, groups]],
                ".weight_shape": ["I64", [2], n],
                ".weight_g_idx": ["I32", [n]],
            },
            format="pack-quantized",
        ),
        _quantized(
            "bitsandbytes",
            {
                ".weight": ["U8", [n * n // 2, 1]],
                ".weight.absmax": ["F32", [n * n // 64]],
                ".weight.quant_map": ["F32", [16]],
                ".weight.quant_state.bitsandbytes__nf4": json.dumps(state),
            },
            load_in_4bit=True,
        ),
        _quantized(
            "bitsandbytes",
            {
                ".weight": ["U8", [n * n // 2, 1]],
                ".weight.absmax": ["U8", [n * n // 64]],
                ".weight.quant_map": ["F32", [16]],
                ".weight.nested_absmax": ["F32", [1]],
                ".weight.nested_quant_map": ["F32", [256]],
                ".weight.quant_state.bitsandbytes__nf4": json.dumps(nested),
            },
        ),
        _quantized(
            "bitsandbytes",
            {".weight": ["I8", [n, n]], ".SCB": ["F32", [n]], ".weight_format": ["U8", [], 0]},
        ),
        _quantized(
            "gptq",
            {".qweight": ["I32", [n // 8, n]], ".g_idx": ["I32", [n]], **ints},
            bits=4,
            group_size=16,
        ),
        _quantized(
            "gptq",
            {".qweight": ["I32", [n // 8, n]], **ints},
            bits=4,
            group_size=16,
            checkpoint_format="gptq_v2",
        ),
        _quantized(
            "awq", {".qweight": ["I32", [n, n // 8]], **ints}, bits=4, group_size=16, version="gemm"
        ),
        _quantized(
            "mxfp4",
            {
                ".weight": ["BF16", [n, n]],
                ".x_blocks": ["U8", [1, n, 1, 16]],
                ".x_scales": ["U8", [1, n, 1]],
            },
        ),
        _quantized(
            "fp8",
            {
                ".weight": ["BF16", [n, n]],
                ".x.weight": ["F8_E4M3", [2, n, n]],
                ".x.weight_scale": ["F32", [2, 1, 1]],
            },
        ),
        _floats(
            "nvfp4-pack-quantized",
            4,
            16,
            {
                ".weight_packed": ["U8", [n, n // 2]],
                ".weight_scale": ["F8_E4M3", [n, 2]],
                ".weight_global_scale": ["F32", [1]],
            },
        ),
        _floats(
            "mxfp4-pack-quantized",
            4,
            32,
            {".weight_packed": ["U8", [n, n // 2]], ".weight_scale": ["U8", [n, 1]]},
        ),
        _floats(
            "mxfp8-quantized",
            8,
            32,
            {".weight": ["F8_E4M3", [n, n]], ".weight_scale": ["U8", [n, 1]]},
        ),
        _quantized(
            "modelopt",
            {
                ".weight": ["U8", [n, n // 2]],
                ".weight_scale": ["F8_E4M3", [n, 2]],
                ".weight_scale_2": ["F32", []],
            },
            quant_algo="NVFP4",
        ),
        _quantized(
            "hqq",
            {
                ".W_q": ["U8", [n // 2, n]],
                ".scale": ["BF16", [n, 1]],
                ".zero": ["BF16", [n, 1]],
                ".shape": ["I64", [2], n],
                ".packing": "4bit_u8",
                ".axis": ["I32", [], 1],
                ".group_size": ["I32", [], n],
            },
        ),
        _torchao(
            "Int8Tensor",
            {"block_size": [1, n]},
            qdata=["I8", [n, n]],
            scale=["F32", [n, 1]],
            zero_point=["I8", [n, 1]],
        ),
        _torchao(
            "Int4Tensor",
            {"block_size": [1, n], "shape": [n, n]},
            qdata=["I8", [n, n // 2]],
            scale=["F32", [1, n]],
            zero_point=["F32", [1, n]],
        ),
    ]
    plain = {"model_type": "llama", "torch_dtype": "bfloat16"}

    def run(data: bytes) -> None:
        tree = _parsed(data)
        (base / "config.json").write_bytes(
            dump({**plain, "quantization_config": tree.get("quantization_config")})
        )
        _described(base / "model.safetensors", tree.get("tensors"), tree.get("metadata"))
        use(base, directory)

    return Target(seeds, mutate_json, run)
