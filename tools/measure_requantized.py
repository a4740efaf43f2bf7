"""Measure what of an adapter survives in a 4-bit base's own codes: `streamer merge --requantize` against quantizing the merged weights.

    pip install bitsandbytes compressed-tensors, and what measure_forgetting.py asks for
    python tools/measure_requantized.py DIRECTORY --adapters qa          DIRECTORY as measure_forgetting.py left it; 30 CPU minutes each

The decoder's linear layers are stored as NF4 (bitsandbytes), int4 and MXFP4 (compressed-tensors), in blocks of 64, 32 and 32 inputs, and
mapped by `streamer map`. Models are measured in float32 by transformers and PEFT on test text of the task and on general text: loss, and
the divergence (nats a token) from the 4-bit base with the adapter beside it, which is what a merge should be. "the original, merged, then
quantized" is for those who still have the 16-bit base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure_forgetting as forgetting
import numpy as np
import torch
import train_small
from safetensors.torch import load_file, save_file

import streamer

Parts = dict[str, torch.Tensor]
Codes = Callable[[torch.Tensor], Parts]


def nf4(weight: torch.Tensor) -> Parts:
    """Quantize as bitsandbytes stores it."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return {
        "weight": codes,
        **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()},
    }


def compressed(encoding: str, **options: Any) -> tuple[Codes, dict[str, Any]]:
    """Make a quantizer of compressed-tensors, and the config of its models."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    preset = None if options else preset_name_to_scheme("MXFP4A16", ["Linear"])
    scheme = preset or QuantizationScheme(targets=["Linear"], weights=options)
    stated = json.loads(scheme.model_dump_json(exclude_none=True))

    def code(weight: torch.Tensor) -> Parts:
        low, high = weight.view(len(weight), -1, 32).aminmax(dim=2)
        scale = calculate_qparams(low, high, scheme.weights)[0]
        compressor = BaseCompressor.get_value_from_registry(encoding)
        return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)

    return code, {
        "quant_method": "compressed-tensors",
        "format": encoding,
        "config_groups": {"group_0": stated},
    }


def formats() -> dict[str, tuple[Codes, dict[str, Any]]]:
    """Quantizers, and what a config says of them."""
    integers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return {
        "NF4": (
            nf4,
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ),
        "int4": compressed("pack-quantized", **integers),
        "MXFP4": compressed("mxfp4-pack-quantized"),
    }


def quantize(plain: Path, out: Path, code: Codes, stated: dict[str, Any]) -> None:
    """Write a model with the decoder's linear layers quantized."""
    others = (
        p
        for p in plain.iterdir()
        if p.suffix != ".safetensors" and not p.name.startswith("streamer")
    )
    out.mkdir()
    for path in others:
        out.joinpath(path.name).write_bytes(path.read_bytes())
    config = json.loads(out.joinpath("config.json").read_text()) | {"quantization_config": stated}
    out.joinpath("config.json").write_text(json.dumps(config))
    tensors: Parts = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        linear = name.endswith("_proj.weight")
        parts = code(weight.float()) if linear else {"weight": weight}
        tensors |= {
            f"{name.removesuffix('weight')}{part}": t.contiguous() for part, t in parts.items()
        }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def decode(base: Path, adapter: Path, out: Path) -> Path:
    """Write the values that a base's codes represent."""
    if not out.exists():
        streamer.merge_with_reduced_intruder_dimensions(
            base,
            adapter,
            out,
            method="shrink",
            mitigation_lambda=0.0,
            dequantize=True,
            dtype="fp32",
        )
    return out


def measured(
    base: Path, adapter: Path | None, texts: list[list[Any]]
) -> list[tuple[np.ndarray, list[torch.Tensor]]]:
    """Sum losses and tokens of each sequence of each text, and keep the log-probabilities."""
    from measure_qlora import scored

    return [scored(base, adapter, rows) for rows in texts]


def main() -> int:
    """Quantize, map, merge, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--adapters",
        type=train_small.chosen(forgetting.ADAPTERS),
        default=["qa"],
        help="(default: qa)",
    )
    parser.add_argument("--formats", default="NF4,int4,MXFP4", help="(default: all)")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    home: Path = args.directory.absolute()
    work = home / "requantized"
    work.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    print(
        "| adapter | base | model | loss on its task | general | KL from base + adapter: task | general | survives | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.adapters:
        adapter = home / "made" / f"{name}-0" / "adapter"
        (task,) = (home / "texts").glob(f"{name}-test.*")
        texts = [
            forgetting.sequences(path, tokenizer)
            for path in (task, home / "texts" / "general-test.txt")
        ]
        merged = work / f"{name}-merged"
        if not merged.exists():
            streamer.merge_with_reduced_intruder_dimensions(
                home / "base", adapter, merged, mitigation_lambda=1.0
            )
        for kind in args.formats.split(","):
            code, stated = formats()[kind]
            places = {
                "alone": work / kind,
                "the original, merged, then quantized": work / f"{name}-{kind}-original",
            }
            for plain, out in zip((home / "base", merged), places.values(), strict=True):
                if not out.exists():
                    quantize(plain, out, code, stated)
            base = work / kind
            mapped = work / f"{kind}.map.safetensors"
            if not mapped.exists():
                streamer.map_inputs(
                    base,
                    output=mapped,
                    general=home / "texts" / "general.txt",
                    vectors=128,
                    sequences=64,
                )
            ours = work / f"{name}-{kind}-requantized"
            nearest = work / f"{name}-{kind}-nearest"
            record = streamer.merge_with_reduced_intruder_dimensions(
                base, adapter, ours, mitigation_lambda=1.0, requantize=mapped, overwrite=True
            )
            shutil.rmtree(
                ours.with_name(f"{ours.name}-decoded"), ignore_errors=True
            )  # of an earlier version
            plain = decode(base, adapter, work / f"{kind}-decoded")
            if not nearest.exists():
                sums = work / f"{name}-{kind}-sum"
                streamer.merge_with_reduced_intruder_dimensions(
                    base,
                    adapter,
                    sums,
                    mitigation_lambda=1.0,
                    dequantize=True,
                    dtype="fp32",
                    overwrite=True,
                )
                quantize(sums, nearest, code, stated)
            places |= {"merged, then quantized again": nearest, "merged, --requantize": ours}
            trained = measured(plain, adapter, texts)
            rows = [
                record["matrices"][i][key]
                for key in ("survives", "rounding_error")
                for i in range(len(record["matrices"]))
            ]
            shares = [f"{100 * float(np.mean(half)):.0f} %" for half in np.array_split(rows, 2)]
            for label, place in {"+ adapter": None, **places}.items():
                at = (
                    None
                    if place is None
                    else decode(place, adapter, place.with_name(f"{place.name}-decoded"))
                )
                found = trained if at is None else measured(at, None, texts)
                cells = [
                    "{:.3f} ± {:.3f}".format(*forgetting.ratio(sums[0], sums[2]))
                    for sums, _ in found
                ]
                for (_, here), (sums, there) in zip(found, trained, strict=True):
                    each = [
                        (t.float().exp() * (t.float() - h.float())).double().sum().item()
                        for h, t in zip(here, there, strict=True)
                    ]
                    cells.append(
                        "{:.3f} ± {:.3f}".format(*forgetting.ratio(np.array(each), sums[2]))
                    )
                cells += shares if label.endswith("--requantize") else ["", ""]
                print(f"| {name} | {kind} | {label} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
