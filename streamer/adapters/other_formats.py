"""Recognise LoRA files of other libraries so that the refusal can name the library; `TensorRule`s cover PEFT's own files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamer.errors import StreamerError, UnsupportedError
from streamer.storage.tensor_file import TensorFile


@dataclass(frozen=True)
class OtherFormat:
    """One library's LoRA files, recognised by tensor names, and how to convert them to a PEFT adapter."""

    title: str
    tensor: re.Pattern[str]
    instead: str


# GPT-2's layers are named ``transformer.h``.
_DIFFUSERS = re.compile(
    r"^(?:unet|transformer(?!\.h\.)|diffusion_model|text_encoder\w*)\..*(?:lora_[AB]|lora\.(?:down|up))\.weight$"
)

FORMATS = (
    OtherFormat("kohya-ss (LyCORIS)", re.compile(r"^lora_\w+\.(?:lora_(?:down|up)\.weight|alpha|hada_w1_a|lokr_w1)$"),
                "give the file itself, with a diffusers pipeline as the base; LoHa and LoKr have to be converted to LoRA first"),
    OtherFormat("MLX", re.compile(r"\.lora_[ab]$"),
                "transpose lora_a and lora_b, name them lora_A.weight and lora_B.weight, and write PEFT's adapter_config.json"),
    OtherFormat("old versions of diffusers", _DIFFUSERS,
                "load it in a new version of diffusers, save it with save_lora_weights, and give that file alone"),
)  # fmt: skip


def refuse_other_formats(path: Path) -> None:
    """Refuse a LoRA of another library and name that library; `path` is a safetensors file, or a directory with some.

    Raises
    ------
    UnsupportedError
        If a file is in another format. Unreadable files are skipped.
    """
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            names = [info.name for info in TensorFile(file).header.tensors]
        except StreamerError:
            continue
        if (found := _format(names)) is not None:
            raise UnsupportedError(
                f"{file}: refused: a LoRA in the format of {found.title}, which is not supported here; {found.instead}"
            )


def _format(names: Iterable[str]) -> OtherFormat | None:
    return next((one for name in names for one in FORMATS if one.tensor.search(name)), None)
