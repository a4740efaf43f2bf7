"""Quantize a model with llm-compressor, with an adapter merged in and its intruders scaled down, and no merged model in between.

    pip install llmcompressor
    python examples/quantize_merged.py BASE ADAPTER quantized --scheme FP8_DYNAMIC --lambda 0.75 --findings findings.safetensors

llm-compressor reads the base file by file and quantizes what `Merge` makes of each. Config and tokenizer are the base's, so an adapter
that changes names, shapes or dtypes of tensors is refused. An example: change it to what you need.
"""

from __future__ import annotations

import argparse
import functools
import threading
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.entrypoints.convert import Converter
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.safetensors_load import get_checkpoint_files, get_weight_map
from llmcompressor import model_free_ptq
from transformers import AutoConfig

import streamer

IGNORE = ["lm_head", "re:.*embed_tokens$"]
"""Modules that stay as they are: from names alone, llm-compressor takes an embedding for a linear layer."""


def quantize(
    base: Path, adapter: Path, output: Path, scheme: str, ignore: list[str] = IGNORE, **options: Any
) -> None:
    """Write the merged model quantized; see `Merge` for the options."""
    model_free_ptq(base, output, scheme, ignore=ignore, converter=Merge(base, adapter, **options))


class Merge(Converter):
    """Converter of a base's tensors into those of the merged model.

    Parameters
    ----------
    base, adapter
        Directories, as `streamer.iter_merged` takes them; the base is the one that llm-compressor reads.
    options
        Of `streamer.iter_merged`: `mitigation_lambda`, `findings`, `method` and so on.
    """

    def __init__(self, base: Path, adapter: Path, **options: Any) -> None:
        self.merged = functools.partial(
            streamer.iter_merged, base, adapter, dequantize=True, **options
        )
        self.lock = (
            threading.Lock()
        )  # with several workers, llm-compressor converts several files at once
        names = get_weight_map(get_checkpoint_files(base))
        for name, _ in self.merged(tensors=lambda name: name not in names):
            refuse(name, "the merged model has it, the base does not")
        if (
            AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings
            and "lm_head.weight" in names
        ):
            refuse(
                "lm_head.weight",
                "the base has it though it is tied, and a merge may untie it in the config",
            )

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace the tensors by merged ones, one at a time."""
        left = {*tensors}
        with self.lock:
            for name, merged in self.merged(tensors=left.copy().__contains__):
                base = tensors[name]
                if (merged.dtype, merged.shape) != (base.dtype, base.shape):
                    before, after = (f"{t.dtype} {[*t.shape]}" for t in (base, merged))
                    refuse(name, f"{before} in the base, {after} in the merged model")
                tensors[name] = merged.to(base.device)
                left.remove(name)
        for name in left:
            refuse(name, "the base has it, the merged model does not")
        return tensors

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors, which have no values yet: those of the merged model have the same names, shapes and dtypes."""
        return tensors

    def get_dependencies(self, weight_name: str) -> set[str]:
        """Name no other tensors to read: streamer reads what it needs."""
        return set()

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        """Return the config as it is."""
        return config


def refuse(name: str, why: str) -> None:
    """Stop, and say what works instead."""
    raise SystemExit(f"{name}: {why}; run `streamer merge`, then quantize its output")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--lambda",
        dest="mitigation_lambda",
        type=float,
        default=0.75,
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--findings",
        type=Path,
        help="of `streamer detect`; without them each matrix is judged first",
    )
    parser.add_argument(
        "--scheme",
        default="FP8_DYNAMIC",
        help="llm-compressor's, like W4A16 (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore",
        nargs="*",
        default=IGNORE,
        help="modules to leave as they are (default: %(default)s)",
    )
    quantize(**vars(parser.parse_args()))
