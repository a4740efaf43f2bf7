"""Write a Llama-shaped checkpoint of any size and a LoRA adapter with planted intruders, tensor by tensor.

    python tools/make_checkpoint.py DIR --size-gb 4 --shards 1            4 GB in one model.safetensors
    python tools/make_checkpoint.py DIR --hidden 192 --layers 2           a tiny one, for a test
    python tools/make_checkpoint.py DIR --layers 32 --shard-bytes 5e9     shards of at most 5 GB, as the hub has them

DIR/base is a model that `transformers` loads, DIR/adapter a PEFT adapter on every linear layer. Each weight is a power-law
top part of its own (singular values j^-0.7, at most 64 of them) and a bulk of noise below it; all matrices take their noise
from one buffer, each at another offset, so that the disk sets the pace and memory does not grow with the model. The adapter
holds the demo's intruders in each layer's q_proj, o_proj and down_proj; below a width of 192 they mix with the base. The same
arguments give the same bytes on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamer.demo import PLANTED, DemoModel, Llama, planted_factors, power_law, write_adapter, write_base
from streamer.storage.header import tensor_nbytes

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
TOP = 64
BLOCK = 1 << 22
"""Values that are made at a time."""


class Noise:
    """Standard normal values from one buffer: a matrix is a window into it."""

    def __init__(self, largest: int, generator: torch.Generator) -> None:
        self.buffer = torch.randn(largest + (1 << 16), generator=generator)

    def rows(self, offset: int, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of the matrix whose window begins at `offset`; a matrix larger than the buffer repeats it."""
        count = (stop - start) * shape[1]
        at = (offset + start * shape[1]) % (len(self.buffer) - count + 1)
        return self.buffer[at : at + count].view(stop - start, shape[1])


def seed_of(seed: int, index: int) -> torch.Generator:
    """A generator for one tensor, so that none depends on the others."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def split(model: Llama, dtype: str, shards: int | None, shard_bytes: int | None) -> list[list[str]]:
    """Names by shard, in file order: `shards` of about equal bytes, or as few as keep each within `shard_bytes`."""
    sizes = {name: tensor_nbytes(dtype, shape) for name, shape in model.tensors.items()}
    groups: list[list[str]] = [[]]
    if shard_bytes is None:
        shards = shards or 1
        if not 1 <= shards <= len(sizes):
            raise SystemExit(f"--shards: expected 1 to {len(sizes)}, the number of tensors, found {shards}")
        done, total = 0, sum(sizes.values())
        for left, (name, size) in zip(range(len(sizes), 0, -1), sizes.items(), strict=True):
            missing = shards - len(groups)
            if groups[-1] and missing and (done + size / 2 > total * len(groups) / shards or left <= missing):
                groups.append([])
            groups[-1].append(name)
            done += size
        return groups
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def make_checkpoint(
    directory: Path,
    model: Llama,
    dtype: str = "BF16",
    *,
    shards: int | None = 1,
    shard_bytes: int | None = None,
    rank: int = 16,
    seed: int = 0,
) -> DemoModel:
    """Write ``directory/base`` and ``directory/adapter``; the scale of the adapter is 2."""
    shapes, modules = model.tensors, model.modules
    number = {name: i for i, name in enumerate(shapes)}
    noise = Noise(max(BLOCK, *(m * n for m, n in modules.values())), seed_of(seed, -1))

    def rows(name: str) -> Iterator[Tensor]:
        shape = shapes[name]
        if len(shape) == 1:
            yield torch.ones(shape)
            return
        m, n = shape
        g = seed_of(seed, number[name])
        offset = int(torch.randint(1 << 16, (), generator=g))
        top = power_law((m, n), g, top=TOP) if name.removesuffix(".weight") in modules else None
        # The bulk's largest singular value is about (√m + √n)·std: half of the last of the top part. Small matrices have no bulk.
        std = 0.02 if top is None else 0.5 * TOP**-0.7 / (m**0.5 + n**0.5) if min(m, n) > TOP else 0.0
        for start in range(0, m, max(1, BLOCK // n)):
            stop = min(m, start + max(1, BLOCK // n))
            piece = noise.rows(offset, (m, n), start, stop) * std
            yield piece if top is None else piece.addmm_(top.L[start:stop], top.R.T)

    planted = {m: PLANTED[kind] for m in modules if (kind := ".".join(m.split(".")[3:])) in PLANTED}

    def factors(module: str) -> tuple[Tensor, Tensor]:
        g = seed_of(seed, len(number) + number[f"{module}.weight"])
        return planted_factors(modules[module], rank, 2.0, planted.get(module, 0), g)

    base, adapter = directory / "base", directory / "adapter"
    write_base(base, model, dtype, split(model, dtype, shards, shard_bytes), rows)
    write_adapter(adapter, model, rank, 2.0 * rank, factors)
    return DemoModel(base, adapter, {f"{m}.weight": count for m, count in planted.items()})


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is generated, for whoever generates."""
    g = parser.add_argument_group("the generated model")
    g.add_argument("--hidden", type=int, default=4096, metavar="N", help="width (default: 4096)")
    g.add_argument("--intermediate", type=int, metavar="N", help="width inside the MLP (default: 3.5 times hidden)")
    g.add_argument("--layers", type=int, metavar="N", help="blocks (default: 2, or what --size-gb asks for)")
    g.add_argument(
        "--vocab", type=int, metavar="N", help="rows of the embedding (default: 32000; 256 below hidden 512)"
    )
    g.add_argument("--heads", type=int, metavar="N", help="attention heads (default: hidden / 128, at least 4)")
    g.add_argument("--kv-heads", type=int, metavar="N", help="heads of k_proj and v_proj (default: a quarter of heads)")
    g.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the base; the adapter is fp32 (default: bf16)")
    g.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapter, at least 2 (default: 16)")
    g.add_argument("--size-gb", type=float, metavar="X",
                   help="choose the number of layers so that the base has about X·10^9 bytes")  # fmt: skip
    g.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other values (default: 0)")


def model_of(args: argparse.Namespace) -> Llama:
    """The model that the options describe."""
    if args.size_gb is not None and args.layers is not None:
        raise SystemExit("--size-gb chooses the number of layers: give one of --size-gb and --layers")
    if args.rank < max(PLANTED.values()):
        raise SystemExit(f"--rank: expected at least {max(PLANTED.values())}, for the planted intruders")
    heads = args.heads or max(4, args.hidden // 128)
    kv_heads = args.kv_heads or max(1, heads // 4)
    if args.hidden % (2 * heads) or heads % kv_heads:
        raise SystemExit(
            f"--heads {heads} must divide --hidden {args.hidden} into even heads, --kv-heads {kv_heads} must divide it"
        )
    vocab = args.vocab or (32000 if args.hidden >= 512 else 256)
    inner = args.intermediate or args.hidden * 7 // 2

    def sized(layers: int) -> Llama:
        return Llama(args.hidden, inner, layers, vocab, heads, kv_heads)

    if args.size_gb is None:
        return sized(args.layers or 2)
    dtype = DTYPES[args.dtype]
    rest = sized(0).nbytes(dtype)
    return sized(max(1, round((args.size_gb * 1e9 - rest) / (sized(1).nbytes(dtype) - rest))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, help="gets base/ and adapter/, which must not exist")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: paths, sizes, planted intruders by tensor"
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--shards", type=int, metavar="K", help="files; 1 is one model.safetensors without index (default: 1)"
    )
    files.add_argument("--shard-bytes", type=float, metavar="SIZE", help="instead: the most bytes of tensors in a file")
    add_model_options(parser)
    args = parser.parse_args()
    for name in ("base", "adapter"):
        if (args.directory / name).exists():
            raise SystemExit(f"{args.directory / name}: exists; name another directory, or remove it")
    model, dtype = model_of(args), DTYPES[args.dtype]
    shard_bytes = None if args.shard_bytes is None else int(args.shard_bytes)
    made = make_checkpoint(args.directory, model, dtype, shards=args.shards, shard_bytes=shard_bytes, rank=args.rank,
                           seed=args.seed)  # fmt: skip
    files_made = sorted(p.name for p in made.base.glob("*.safetensors"))
    tree = {"base": str(made.base), "adapter": str(made.adapter), "bytes": model.nbytes(dtype), "layers": model.layers,
            "files": files_made, "matrices": len(model.modules), "planted": made.planted}  # fmt: skip
    if args.json:
        print(json.dumps(tree, indent=1))
    else:
        print(f"{made.base}: {model.layers} layers, {tree['bytes'] / 1e9:.2f} GB in {len(files_made)} file(s)")
        print(f"{made.adapter}: {tree['matrices']} matrices, {sum(made.planted.values())} intruders planted")


if __name__ == "__main__":
    sys.exit(main())
