"""Make the data of `streamer demo`: a small trained Llama, a LoRA adapter that makes it forget, and texts of both kinds as token ids.

    python tools/make_demo.py           writes streamer/demo anew, in about 15 minutes on two idle cores

`train_small.py` trains both on texts that come with Python. ``general.npy`` and ``task.npy`` are for a fit, ``general-test.npy`` and
``task-test.npy`` to measure it on; nothing was trained on any of them. Documents that name a copyright holder of their own are left out of
the texts. Another Python has other texts, and another processor rounds differently: the bytes are the same only on the same machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import train_small
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[1] / "streamer" / "demo"
SHAPE = {
    "hidden": 128,
    "layers": 4,
    "heads": 4,
    "vocab": 1024,
    "steps": 1500,
    "rate": 4e-3,
    "seed": 0,
}
"""Options of `train_small.py` that make the base."""

ADAPTER = "high"
ADAPTER_STEPS = 100
TOKENS = 16_384
"""Most tokens of a text."""

ABOUT = """\
`base` is a Llama of {parameters:.1f} million parameters, trained on the sources of Python {version}'s standard library; `adapter` is a LoRA
adapter of rank 8, trained on its language reference (`pydoc_data.topics`). `general*.npy` are tokens of such sources, `task*.npy` of the
language reference, none of which either was trained on. `python tools/make_demo.py` made these files.

Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. `LICENSE-PYTHON.txt` is the licence of these texts.
"""


def write_texts(out: Path, tokenizer: Any) -> None:
    """Write the texts that are held out as tokens."""
    for name, documents in train_small.texts().items():
        for file, part in zip(
            (name, f"{name}-test"), train_small.divided(documents)[1:], strict=True
        ):
            ids = train_small.stream(tokenizer, [d for d in part if "copyright" not in d.lower()])
            np.save(out / f"{file}.npy", ids[:TOKENS].numpy().astype(np.uint16))


def tidy(out: Path) -> None:
    """Round the adapter to bfloat16, make its path to the base relative, and say what the files are."""
    weights, config = (
        out / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    save_file(
        {name: factor.bfloat16() for name, factor in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}, indent=2)
        + "\n"
    )
    for path in (out / "adapter" / "README.md", *out.glob("*.txt")):
        path.unlink()
    count = sum(tensor.numel() for tensor in load_file(out / "base" / "model.safetensors").values())
    (out / "README.md").write_text(
        ABOUT.format(parameters=count / 1e6, version=platform.python_version())
    )
    shutil.copy(Path(sysconfig.get_path("stdlib"), "LICENSE.txt"), out / "LICENSE-PYTHON.txt")


def make_demo(out: Path) -> None:
    """Write all files."""
    from transformers import AutoTokenizer

    train_small.make_base(out, argparse.Namespace(**SHAPE, kind="llama", dtype="bf16"))
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    write_texts(out, tokenizer)
    ids = train_small.streams(tokenizer)["task"][0]
    train_small.make_adapter(
        out / "base", out / "adapter", ADAPTER, ids, ADAPTER_STEPS, SHAPE["seed"]
    )
    tidy(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_demo(Path(directory, "demo"))
        shutil.rmtree(DATA, ignore_errors=True)
        shutil.copytree(
            Path(directory, "demo"), DATA, copy_function=shutil.copyfile
        )  # with usual modes
    print(f"{DATA}: {sum(p.stat().st_size for p in DATA.rglob('*') if p.is_file()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
