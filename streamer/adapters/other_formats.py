"""Recognise LoRA files of other libraries so that the refusal can name the library; `TensorRule`s cover PEFT's own files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from streamer.errors import InputError, UnsupportedError
from streamer.storage.tensor_file import TensorFile


@dataclass(frozen=True)
class OtherFormat:
    """One library's LoRA files, recognised by tensor names, why they are refused, and what to do."""

    title: str
    tensor: re.Pattern[str]
    instead: str


# GPT-2's layers are named ``transformer.h``.
_DIFFUSERS = re.compile(r"^(?:unet|transformer(?!\.h\.)|text_encoder\w*)\..*(?:lora_[AB]|lora\.(?:down|up))\.weight$")

NOT_HERE = "not supported here"
_SAVE_AGAIN = f"{NOT_HERE}; load it in diffusers, save it with save_lora_weights, and give that file alone"
_ONE_FILE = "read from one file; name it, with a diffusers pipeline as the base"

FORMATS = (
    OtherFormat("LyCORIS (LoHa, LoKr)", re.compile(r"^lora_\w+\.(?:hada|lokr)_w"), f"{NOT_HERE}; convert it to LoRA"),
    OtherFormat("kohya", re.compile(r"^lora_\w+\.lora_(?:down|up)\.weight$"), _ONE_FILE),
    OtherFormat("diffusers", re.compile(r"^(?:unet|transformer(?!\.h\.)|text_encoder(?:_2)?)\..*\.lora_[AB]\.weight$"), _ONE_FILE),
    OtherFormat("MLX", re.compile(r"\.lora_[ab]$"),
                f"{NOT_HERE}; transpose lora_a and lora_b to lora_A.weight and lora_B.weight, and write PEFT's adapter_config.json "
                "(lora_alpha is MLX's scale times the rank)"),
    OtherFormat("ComfyUI", re.compile(r"^diffusion_model\..*\.lora_(?:[AB]|down|up)\.weight$"), _SAVE_AGAIN),
    OtherFormat("old versions of diffusers", _DIFFUSERS, _SAVE_AGAIN),
)  # fmt: skip


def refuse_other_formats(path: Path) -> None:
    """Refuse a LoRA of another library and name that library; `path` is a safetensors file, or a directory with some.

    Raises
    ------
    UnsupportedError
        If a file is in another format. Files that are not safetensors are skipped.
    """
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            names = [info.name for info in TensorFile(file).header.tensors]
        except InputError:
            continue
        found = next((one for one in FORMATS if any(map(one.tensor.search, names))), None)
        if found is not None:
            raise UnsupportedError(f"{file}: refused: a LoRA in the format of {found.title}, which is {found.instead}")
