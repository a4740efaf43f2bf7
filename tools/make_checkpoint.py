"""Write a Llama-shaped checkpoint of any size, or one like a model of the hub, and a LoRA adapter with planted intruders.

    python tools/make_checkpoint.py DIR --size-gb 4 --shards 1                     4 GB in one model.safetensors
    python tools/make_checkpoint.py DIR --hidden 192 --layers 2                    a tiny one, for a test
    python tools/make_checkpoint.py DIR --like llama-3-70b --size-gb 16            real shapes, as many layers as come nearest
    python tools/make_checkpoint.py DIR --like qwen3-moe --layers 4                the other models are llama-3-8b and mixtral
    python tools/make_checkpoint.py DIR --like mixtral --hidden 192 --layers 1     names and config of one, but tiny

DIR/base is a model that `transformers` loads, DIR/adapter a PEFT adapter on every linear layer, and on the experts of a mixture.
Each weight is a power-law top part of its own (singular values j^-0.7, at most 64 of them) and a bulk of noise below it; all
matrices take their noise from one buffer, each at another offset, so that the disk sets the pace and memory does not grow with
the model. The adapter holds intruders in each layer's q_proj, o_proj and down_proj, and in the down_proj of every other
expert; below a width of 192 they mix with the base. The same arguments give the same bytes on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from shapes import KNOWN, Known, Llama, Mixture, lora_shapes
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME as ADAPTER_CONFIG
from streamer.adapters.adapter_config import WEIGHTS_NAME
from streamer.api.tensors import write_safetensors
from streamer.linalg.operators import LowRank
from streamer.linalg.torch_state import threads
from streamer.storage.atomic_file import Piece, index_bytes, plan_shard, write_atomic, write_shard
from streamer.storage.checkpoint import INDEX_NAME, shard_names
from streamer.storage.header import TensorInfo, tensor_nbytes
from streamer.weights.base import FLOATS, as_bytes

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
SCALE = 2.0
HUB_SHARD_BYTES = 5 * 10**9
SIZES = ("intermediate", "heads", "kv_heads", "vocab")
TOP = 64
BLOCK = 1 << 22
"""Values that are made at a time."""

PLANTED = {"self_attn.q_proj": 1, "self_attn.o_proj": 2, "mlp.down_proj": 1}
"""Intruders planted in each layer, by module; other modules get none."""

SIGMA = (1.4, 0.8)
"""Singular values of the intruders, well apart from the base's 1, 0.616, 0.463, …; close values would mix their directions."""


@dataclass(frozen=True)
class GeneratedModel:
    """Generated base and adapter, and the number of planted intruders by base tensor."""

    base: Path
    adapter: Path
    planted: dict[str, int]


def power_law(
    shape: tuple[int, int], generator: torch.Generator, decay: float = 0.7, top: int | None = None
) -> LowRank:
    """Make a random matrix with singular values ``j^-decay``, all or the first `top`, as float32 factors."""
    p = min(*shape, *(() if top is None else (top,)))
    U = torch.linalg.qr(torch.randn(shape[0], p, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], p, generator=generator)).Q
    return LowRank(U * torch.arange(1, p + 1).pow(-decay), V)


def planted_factors(
    shape: tuple[int, int], rank: int, scaling: float, planted: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make ``A`` (rank, n) and ``B`` (m, rank): `planted` intruders with singular values `SIGMA`, and a small random rest.

    In a trained adapter, the rest follows directions of the base; here it is small and random.
    """
    m, n = shape
    A = torch.randn(rank, n, generator=generator) / n**0.5
    B = 0.05 * torch.randn(m, rank, generator=generator) / m**0.5
    for j in range(planted):
        u = torch.randn(m, generator=generator)
        B[:, j] = u / u.norm() * SIGMA[j] / scaling / A[j].norm()
    return A, B


def write_base(
    directory: Path,
    model: Llama,
    dtype: str,
    shards: Sequence[Sequence[str]],
    rows: Callable[[str], Iterable[Tensor]],
) -> None:
    """Write a base model: one file, or shards with their index, and the config, with one piece in memory at a time.

    Parameters
    ----------
    shards
        Names of the tensors in each file.
    rows
        Returns a tensor's values in consecutive pieces of whole rows, which are rounded to `dtype`.
    """
    directory.mkdir(parents=True)

    def source(info: TensorInfo) -> Iterator[Piece]:
        for piece in rows(info.name):
            yield Piece(as_bytes(piece.to(FLOATS[dtype])))

    shapes = model.tensors
    weight_map: dict[str, str] = {}
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        plan = plan_shard(file, [(name, dtype, shapes[name]) for name in names], {"format": "pt"})
        write_shard(directory, plan, ((info, source(info)) for info in plan.header.tensors))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_atomic(
            directory / INDEX_NAME, index_bytes({"weight_map": weight_map}, model.nbytes(dtype))
        )
    write_atomic(directory / "config.json", json.dumps(model.config(dtype), indent=2).encode())


def write_adapter(
    directory: Path,
    targets: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
    rank: int,
    alpha: float,
    factors: Callable[[str], tuple[Tensor, Tensor]],
) -> None:
    """Write a LoRA adapter as PEFT does.

    Parameters
    ----------
    targets
        Entries of the config that name its targets.
    shapes
        Shapes of ``lora_A`` and ``lora_B`` by module.
    factors
        Returns a module's A and B.
    """
    directory.mkdir(parents=True)
    sizes = {
        (module, which): size
        for module, pair in shapes.items()
        for which, size in zip("AB", pair, strict=True)
    }
    names = {key: f"base_model.model.{key[0]}.lora_{key[1]}.weight" for key in sizes}
    tensors = (
        (names[module, which], tensor)
        for module in shapes
        for which, tensor in zip("AB", factors(module), strict=True)
    )
    entries = [(names[key], "F32", size) for key, size in sizes.items()]
    write_safetensors(directory / WEIGHTS_NAME, entries, tensors, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "fan_in_fan_out": False,
        **targets,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "generated",
        "peft_version": "0.21.2",
    }
    write_atomic(directory / ADAPTER_CONFIG, json.dumps(config, indent=2).encode())


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


def split(model: Known, dtype: str, shards: int | None, shard_bytes: int | None) -> list[list[str]]:
    """Names by shard, in file order: `shards` of about equal bytes, or as few as keep each within `shard_bytes`."""
    sizes = {name: tensor_nbytes(dtype, shape) for name, shape in model.tensors.items()}
    groups: list[list[str]] = [[]]
    if shard_bytes is None:
        shards = shards or 1
        if not 1 <= shards <= len(sizes):
            raise SystemExit(
                f"--shards: expected 1 to {len(sizes)}, the number of tensors, found {shards}"
            )
        done = 0
        total = sum(sizes.values())
        for left, (name, size) in zip(range(len(sizes), 0, -1), sizes.items(), strict=True):
            missing = shards - len(groups)
            if (
                groups[-1]
                and missing
                and (done + size / 2 > total * len(groups) / shards or left <= missing)
            ):
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


def planted_in(model: Known, module: str, expert: int | None = None) -> int:
    """The number of intruders in a module of the adapter; of experts every other one has some, on its way back."""
    if expert is None:
        return PLANTED.get(".".join(module.split(".")[3:]), 0)
    return (
        PLANTED["mlp.down_proj"]
        if model.stacks[module][0].endswith("down_proj") and expert % 2 == 0
        else 0
    )


def all_planted(model: Known) -> dict[str, int]:
    """Intruders by the name that findings give to the matrix."""
    found = {f"{module}.weight": planted_in(model, module) for module in model.modules}
    for module, (parameter, experts, _) in model.stacks.items():
        found |= {f"{parameter}[{e}]": planted_in(model, module, e) for e in range(experts)}
    return {name: count for name, count in found.items() if count}


class Values:
    """The values of each tensor of the base and of the adapter, from seeds of their own."""

    def __init__(self, model: Known, rank: int, seed: int) -> None:
        self.model = model
        self.rank = rank
        self.seed = seed
        self.shapes = model.tensors
        self.matrices = model.matrices
        self.lora = lora_shapes(model, rank)
        for module, (_, experts, (m, n)) in model.stacks.items():
            self.lora[module] = (experts * rank, n), (m, rank * experts)
        self.seeds = {name: i for i, name in enumerate((*self.shapes, *self.lora))}
        self.noise = Noise(
            max(BLOCK, *(m * n for m, n in self.matrices.values())), seed_of(seed, -1)
        )

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor of the base, a few rows at a time."""
        shape = self.shapes[name]
        if len(shape) == 1:
            yield torch.ones(shape)
            return
        m, n = shape
        g = seed_of(self.seed, self.seeds[name])
        offset = int(torch.randint(1 << 16, (), generator=g))
        top = (
            power_law((m, n), g, top=TOP) if name.removesuffix(".weight") in self.matrices else None
        )
        # The bulk's largest singular value is about (√m + √n)·std: half of the last of the top part. Small matrices have no bulk.
        std = (
            0.02 if top is None else 0.5 * TOP**-0.7 / (m**0.5 + n**0.5) if min(m, n) > TOP else 0.0
        )
        for start in range(0, m, max(1, BLOCK // n)):
            stop = min(m, start + max(1, BLOCK // n))
            piece = self.noise.rows(offset, (m, n), start, stop)
            yield (
                piece * std
                if top is None
                else torch.addmm(piece, top.L[start:stop], top.R.T, beta=std)
            )

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of a module of the adapter; those of a stack stand expert by expert, A's in rows, B's in columns of each rank."""
        g = seed_of(self.seed, self.seeds[module])
        if module not in self.model.stacks:
            return planted_factors(
                self.model.modules[module], self.rank, SCALE, planted_in(self.model, module), g
            )
        _, experts, shape = self.model.stacks[module]
        pairs = [
            planted_factors(shape, self.rank, SCALE, planted_in(self.model, module, e), g)
            for e in range(experts)
        ]
        return torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=2).flatten(
            1
        )


def make_checkpoint(
    directory: Path,
    model: Known,
    dtype: str = "BF16",
    *,
    shards: int | None = 1,
    shard_bytes: int | None = None,
    rank: int = 16,
    seed: int = 0,
) -> GeneratedModel:
    """Write ``directory/base`` and ``directory/adapter``; the scale of the adapter is 2."""
    values = Values(model, rank, seed)
    base = directory / "base"
    adapter = directory / "adapter"
    files = [
        sorted(names) for names in split(model, dtype, shards, shard_bytes)
    ]  # within a file as `save_file` has them
    with (
        threads()
    ):  # many small matrices: a barrier at the end of each costs more than a second thread saves
        write_base(base, model, dtype, files, values.rows)
        write_adapter(adapter, model.targets, values.lora, rank, SCALE * rank, values.factors)
    return GeneratedModel(base, adapter, all_planted(model))


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how the base is cut into files."""
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--shards",
        type=int,
        metavar="K",
        help="files; 1 is one model.safetensors without index (default: 1, or with --like as the hub has it)",
    )
    files.add_argument(
        "--shard-bytes",
        type=float,
        metavar="SIZE",
        help="instead: the most bytes of tensors in a file",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is generated, for whoever generates."""
    g = parser.add_argument_group("the generated model")
    g.add_argument(
        "--like",
        choices=KNOWN,
        help="shapes, names and config of this model of the hub, in shards of at most 5 GB; "
        "the options below change what they name",
    )
    g.add_argument("--hidden", type=int, metavar="N", help="width (default: 4096)")
    g.add_argument(
        "--intermediate",
        type=int,
        metavar="N",
        help="width inside the MLP or an expert (default: 3.5 times hidden)",
    )
    g.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="blocks (default: 2, or all, or what --size-gb asks for)",
    )
    g.add_argument(
        "--vocab",
        type=int,
        metavar="N",
        help="rows of the embedding (default: 32000; 256 below hidden 512)",
    )
    g.add_argument(
        "--heads", type=int, metavar="N", help="attention heads (default: hidden / 128, at least 4)"
    )
    g.add_argument(
        "--kv-heads",
        type=int,
        metavar="N",
        help="heads of k_proj and v_proj (default: a quarter of heads)",
    )
    g.add_argument(
        "--experts", type=int, metavar="N", help="experts of a layer, with --like a mixture"
    )
    g.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="of the base; the adapter is fp32 (default: bf16)",
    )
    g.add_argument(
        "--rank", type=int, default=16, metavar="R", help="of the adapter, at least 2 (default: 16)"
    )
    g.add_argument(
        "--size-gb",
        type=float,
        metavar="X",
        help="choose the number of layers so that the base has about X·10^9 bytes",
    )
    g.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed, other values (default: 0)"
    )


def model_of(args: argparse.Namespace) -> Known:
    """The model that the options describe."""
    if args.size_gb is not None and args.layers is not None:
        raise SystemExit(
            "--size-gb chooses the number of layers: give one of --size-gb and --layers"
        )
    if args.rank < max(PLANTED.values()):
        raise SystemExit(
            f"--rank: expected at least {max(PLANTED.values())}, for the planted intruders"
        )
    like = KNOWN[args.like] if args.like else None
    if args.experts and not isinstance(like, Mixture):
        raise SystemExit("--experts: only a mixture has them; give --like mixtral or qwen3-moe")
    if like is None or args.hidden:
        hidden = args.hidden or 4096
        heads = args.heads or max(4, hidden // 128)
        sizes = {
            "hidden": hidden,
            "intermediate": args.intermediate or hidden * 7 // 2,
            "heads": heads,
            "kv_heads": args.kv_heads or max(1, heads // 4),
            "vocab": args.vocab or (32000 if hidden >= 512 else 256),
        }
    else:
        sizes = {key: value for key in SIZES if (value := getattr(args, key))}
    if isinstance(like, Mixture):
        if args.hidden:
            sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        if args.experts:
            sizes |= {"experts": args.experts, "per_token": min(args.experts, like.per_token)}
    model = replace(like, **sizes) if like else Known(layers=2, **sizes)
    if model.hidden % (2 * model.heads) or model.heads % model.kv_heads:
        raise SystemExit(
            f"--heads {model.heads} must divide --hidden {model.hidden} into even heads, --kv-heads {model.kv_heads} must divide it"
        )
    if args.layers:
        return replace(model, layers=args.layers)
    if args.size_gb is None:
        return model
    dtype = DTYPES[args.dtype]
    none, one = (replace(model, layers=layers).nbytes(dtype) for layers in (0, 1))
    return replace(model, layers=max(1, round((args.size_gb * 1e9 - none) / (one - none))))


def shard_bytes_of(args: argparse.Namespace) -> int | None:
    """The most bytes of tensors in a file; None where a number of files is asked for, or one."""
    if args.shard_bytes is not None:
        return int(args.shard_bytes)
    return HUB_SHARD_BYTES if args.like and args.shards is None else None


def make_as_asked(
    directory: Path, args: argparse.Namespace, times: int = 1
) -> tuple[GeneratedModel, Known]:
    """Write the model that the options describe, with so many times the layers; see `make_checkpoint`."""
    model = model_of(args)
    model = replace(model, layers=times * model.layers)
    made = make_checkpoint(
        directory,
        model,
        DTYPES[args.dtype],
        shards=args.shards,
        shard_bytes=shard_bytes_of(args),
        rank=args.rank,
        seed=args.seed,
    )
    return made, model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="gets base/ and adapter/, which must not exist"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: paths, sizes, planted intruders by tensor",
    )
    add_file_options(parser)
    add_model_options(parser)
    args = parser.parse_args()
    for name in ("base", "adapter"):
        if (args.directory / name).exists():
            raise SystemExit(
                f"{args.directory / name}: exists; name another directory, or remove it"
            )
    made, model = make_as_asked(args.directory, args)
    files_made = sorted(p.name for p in made.base.glob("*.safetensors"))
    matrices = len(model.modules) + sum(experts for _, experts, _ in model.stacks.values())
    tree = {
        "base": str(made.base),
        "adapter": str(made.adapter),
        "bytes": model.nbytes(DTYPES[args.dtype]),
        "layers": model.layers,
        "files": files_made,
        "matrices": matrices,
        "planted": made.planted,
    }
    if args.json:
        print(json.dumps(tree, indent=1))
    else:
        print(
            f"{made.base}: {model.layers} layers, {tree['bytes'] / 1e9:.2f} GB in {len(files_made)} file(s)"
        )
        print(
            f"{made.adapter}: {tree['matrices']} matrices, {sum(made.planted.values())} intruders planted"
        )


if __name__ == "__main__":
    sys.exit(main())
