"""Compare `merge --dtype --max-shard-size` with PEFT's float32 merge saved by transformers, and its memory with a plain merge.

    python tools/compare_merged_form.py DIRECTORY                      a base of 3 GB in bfloat16, made first; 20 GB of memory, minutes
    python tools/compare_merged_form.py DIRECTORY --size-gb 0.5 --dtype fp32 --max-shard-size 100MB

Prints tensors with other bytes, of those that the adapter changes the values that differ and by how many units in the last place at
most, whether both indexes name the same tensors in files of at most the given size, and the anonymous memory of both merges.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from measure import watched
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def located(directory: Path) -> dict[str, Path]:
    """Map each tensor of a model to its file."""
    files = sorted(directory.glob("*.safetensors"))
    names = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    return names


def read(name: str, file: Path) -> torch.Tensor:
    """Read one tensor."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def steps(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float]:
    """Count the values that differ, and give their largest difference in units in the last place of the larger one."""
    differ = ours != theirs
    if not differ.any():
        return 0, 0.0
    a = ours[differ].double()
    b = theirs[differ].double()
    unit = torch.finfo(ours.dtype).eps * torch.maximum(a.abs(), b.abs())
    return int(differ.sum()), float(((a - b).abs() / unit).max())


def main() -> int:
    """Make the inputs if there are none, merge both ways, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-gb", default="3")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--max-shard-size", default="500MB")
    args = parser.parse_args()
    home: Path = args.directory
    base = home / "base"
    adapter = home / "adapter"
    if not base.exists():
        make = [
            sys.executable,
            Path(__file__).with_name("make_checkpoint.py"),
            home,
            "--size-gb",
            args.size_gb,
        ]
        subprocess.run(make, check=True)
    peaks = {}
    form = ["--dtype", args.dtype, "--max-shard-size", args.max_shard_size]
    for name, options in (("plain", []), ("ours", form)):
        shutil.rmtree(home / name, ignore_errors=True)
        line = [
            sys.executable,
            "-m",
            "streamer",
            "merge",
            base,
            adapter,
            "-o",
            home / name,
            "--lambda",
            "1",
            "-q",
            *options,
        ]
        peaks[name] = watched([*map(str, line)]).anonymous
    shutil.rmtree(home / "theirs", ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(DTYPES[args.dtype])
    merged.save_pretrained(home / "theirs", max_shard_size=args.max_shard_size)
    del model, merged
    ours = located(home / "ours")
    theirs = located(home / "theirs")
    changed = {
        name
        for name in ours
        if any(f".{name.split('.')[-2]}.lora_A" in key for key in located(adapter))
    }
    other = 0
    values = 0
    most = 0.0
    for name in ours.keys() & theirs.keys():
        count, largest = steps(read(name, ours[name]), read(name, theirs[name]))
        other += bool(count)
        assert not count or name in changed, name
        values = values + count
        most = max(most, largest)
    index = json.loads((home / "ours" / "model.safetensors.index.json").read_text())
    AutoModelForCausalLM.from_pretrained(home / "ours", dtype="auto")
    print(
        f"{len(ours)} tensors, same names: {ours.keys() == theirs.keys()}; index right: "
        f"{index['weight_map'] == {name: file.name for name, file in ours.items()}}; transformers opens it"
    )
    print(f"files: {len({*ours.values()})} against {len({*theirs.values()})}")
    print(
        f"tensors with other bytes: {other}, all of the {len(changed)} that the adapter changes; values {values}, at most {most:.1f} ulp"
    )
    print(
        f"anonymous memory: plain {peaks['plain'] / 1e6:.0f} MB, with {' '.join(form)} {peaks['ours'] / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
