"""List the SHA-256 of everything that the commands write and print, to compare two versions of the code byte for byte.

    python tools/digest_outputs.py > before.txt               lines `digest  case/file`
    python tools/digest_outputs.py --compare before.txt       prints what differs; exits with 1 where anything does
    python tools/digest_outputs.py --keep DIR > before.txt    keeps all files, to see what a difference is

It runs the `streamer` on PATH, a process a command, on small generated inputs: a LoRA adapter on a plain, a sharded and an FP8 base, a
DoRA adapter, an adapter on experts' parameters, a fine-tuned model; PEFT writes the adapters, seeds are fixed. The inputs are in the
list as well: where `input/` differs, or `version/`, which outputs record, all else may. Some 120 processes take three minutes of
processor time.

Files are compared as they are: they hold no times, paths or thread numbers. From what is printed the following is taken out: in JSON the
keys of `MEASURED`; in text the seconds after "in" and "about" and the figures of the table of forecasts. Commands take `--threads 2`:
lists are comparable where they are from one machine, with one version of torch and of PEFT.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ENV = {
    **os.environ,
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "2",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
}

MEASURED = {"seconds", "forecast", "free_bytes"}
"""Keys of printed JSON whose values depend on the machine or the moment."""

TIMES = re.compile(r"\b(in|about) [\d.]+ (ms|s|min|h)\b")
FORECAST = re.compile(r"^(forecast +memory .*\n(?:.+\n)*|forecast: .*\n)", re.M)
"""The rows of the table of forecasts, or the line of one command's."""

MITIGATIONS = [
    (method, value) for method in ("paper", "project", "shrink") for value in ("0.5", "0")
]

ITERATE = """
import hashlib, json, sys, torch, streamer
lines = []
for base, adapter, findings in json.loads(sys.argv[1]):
    for name, t in streamer.iter_merged(base, adapter, findings=findings, mitigation_lambda=0.5):
        data = hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append([base, adapter, name, str(t.dtype), list(t.shape), data])
print(json.dumps(lines))
"""


class Run(NamedTuple):
    """A command, and the name under which its output, exit code and printed text are listed."""

    name: str
    line: tuple[str, ...]


# Inputs


def tensors(experts: bool = False) -> dict[str, Any]:
    """Tensors of a model of two layers: matrices with singular values that fall by a power law, float32."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def matrix(m: int, n: int) -> torch.Tensor:
        p = min(m, n)
        U, V = (
            torch.linalg.qr(torch.randn(size, p, generator=generator, dtype=torch.float64)).Q
            for size in (m, n)
        )
        return (U * torch.arange(1, p + 1, dtype=torch.float64).pow(-0.7) @ V.T).float()

    found = {"model.embed_tokens.weight": matrix(64, 48)}
    for layer in range(2):
        home = f"model.layers.{layer}"
        found[f"{home}.self_attn.q_proj.weight"] = matrix(48, 48)
        if experts:
            found[f"{home}.mlp.experts.gate_up_proj"] = torch.stack(
                [matrix(48, 64) for _ in range(3)]
            )
            found[f"{home}.mlp.experts.down_proj"] = torch.stack([matrix(32, 48) for _ in range(3)])
        else:
            found[f"{home}.mlp.up_proj.weight"] = matrix(96, 48)
            found[f"{home}.mlp.down_proj.weight"] = matrix(48, 96)
        found[f"{home}.input_layernorm.weight"] = torch.ones(48)
    return found | {"lm_head.weight": matrix(64, 48)}


def module_tree(weights: dict[str, Any]) -> Any:
    """A torch module whose parameters have these names and values, linear where a name says so: what PEFT wraps."""
    import torch

    root = torch.nn.Module()
    for name, t in weights.items():
        *path, kind = name.split(".")
        home = root
        for i, step in enumerate(path):
            if not hasattr(home, step):
                linear = i == len(path) - 1 and step.endswith(("_proj", "lm_head"))
                home.add_module(
                    step,
                    torch.nn.Linear(*t.shape[::-1], bias=False) if linear else torch.nn.Module(),
                )
            home = getattr(home, step)
        setattr(home, kind, torch.nn.Parameter(t.clone()))
    return root


def write_base(
    directory: Path, weights: dict[str, Any], model_type: str, shards: int = 1, **config: Any
) -> None:
    """A model's directory, with a tokenizer's file and one in a folder beside the weights."""
    from safetensors.torch import save_file

    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    tree = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "torch_dtype": "bfloat16",
        **config,
    }
    (directory / "config.json").write_text(json.dumps(tree))
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        )
        own = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file(
            {n: weights[n].contiguous() for n in own}, directory / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(own, file)
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
            "weight_map": weight_map,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def in_fp8(weights: dict[str, Any]) -> dict[str, Any]:
    """The layers' matrices in FP8 with a scale a row, as compressed-tensors saves them."""
    import torch

    found = {}
    for name, t in weights.items():
        found[name] = t.bfloat16()
        if name.endswith("_proj.weight"):
            scale = (t.abs().amax(1, keepdim=True) / 448).bfloat16()
            found[name] = (t / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale
    return found


def write_adapter(directory: Path, weights: dict[str, Any], seed: int, **options: Any) -> None:
    """An adapter of rank 4 that PEFT makes and saves, one large direction and three small ones in every B."""
    import peft
    import torch

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, **options)
        model = peft.get_peft_model(module_tree(weights), config)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if ".lora_B." in name:
                    p.copy_(0.01 * torch.randn(p.shape))
                    p[:, 0] += torch.randn(p.shape[0]) / p.shape[0] ** 0.5
                elif ".modules_to_save." in name:
                    p.mul_(1.01)
        model.save_pretrained(str(directory), save_embedding_layers=False)


def write_inputs(home: Path) -> None:
    """All bases and adapters."""
    plain = tensors()
    experts = tensors(experts=True)
    halves = {n: t.bfloat16() for n, t in plain.items()}
    write_base(home / "plain", halves, "llama")
    write_base(home / "sharded", halves, "llama", shards=3)
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    write_base(home / "fp8", in_fp8(plain), "llama", shards=2, quantization_config=quantization)
    write_base(home / "stacked", {n: t.bfloat16() for n, t in experts.items()}, "mixtral", shards=2)
    write_base(
        home / "other", {n: t[:, :40] if t.dim() == 2 else t for n, t in halves.items()}, "llama"
    )
    where = r".*\.(q_proj|up_proj|down_proj)"
    write_adapter(home / "several" / "lora", plain, 1, target_modules=where)
    write_adapter(home / "several" / "dora", plain, 2, target_modules=where, use_dora=True)
    write_adapter(
        home / "several" / "saved", plain, 3, target_modules=where, modules_to_save=["lm_head"]
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    write_adapter(home / "on-experts", experts, 4, target_modules=[], target_parameters=parameters)
    tuned = {
        n: t + 0.3 * t.flip(0) if n.endswith("q_proj.weight") else t for n, t in halves.items()
    }
    write_base(home / "tuned", tuned, "llama")


FIXTURES = {
    "lora": ("input/plain", "input/several/lora"),
    "dora": ("input/plain", "input/several/dora"),
    "experts": ("input/stacked", "input/on-experts"),
    "fp8": ("input/fp8", "input/several/lora"),
    "sharded": ("input/sharded", "input/several/lora"),
    "tuned": ("input/plain", "input/tuned"),
}
"""Base and adapter by name, relative to the working directory."""


# Commands


def first_runs() -> Iterator[Run]:
    """The demo, what is there, and findings."""
    yield Run("demo", ("demo", "-o", "demo/out", "--json"))
    yield Run("version", ("--version",))
    for name, inputs in FIXTURES.items():
        yield Run(
            f"{name}/detect", ("detect", *inputs, "-o", f"{name}/detect/out.safetensors", "--json")
        )
        yield Run(f"{name}/inspect", ("inspect", *inputs))
    yield Run("lora/inspect-json", ("inspect", *FIXTURES["lora"], "--json"))
    for name in ("lora", "dora", "experts", "fp8"):
        case = f"{name}/certified"
        options = ("--solver", "certified", "--top-k", "4", "--all")
        yield Run(case, ("detect", *FIXTURES[name], "-o", f"{case}/out.safetensors", *options))
    yield Run(
        "several/detect",
        ("detect", "input/plain", "input/several", "-o", "several/detect/out", "--json"),
    )


PAPER = "--method", "paper"


def later_runs() -> Iterator[Run]:
    """Outputs from findings and without, reports, refusals."""
    for name, inputs in FIXTURES.items():
        findings = f"{name}/detect/out.safetensors"
        commands = ("mitigate", "merge", *(["merge --dequantize"] if name == "fp8" else []))
        for command, (method, value) in itertools.product(
            commands, MITIGATIONS[:1] if name == "tuned" else MITIGATIONS
        ):
            case = f"{name}/{command.replace(' --', '-')}-{method}-{value}"
            given = () if method == "shrink" else ("--findings", findings)
            options = ("--method", method, "--lambda", value, "--json", *given)
            verb, *more = command.split()
            yield Run(case, (verb, *inputs, "-o", f"{case}/out", *more, *options))
        yield Run(f"{name}/report", ("report", findings, "--all"))
    lora = FIXTURES["lora"]
    yield Run("lora/report-json", ("report", "lora/detect/out.safetensors", "--json"))
    yield Run(
        "lora/mitigate-alone",
        ("mitigate", *lora, "-o", "lora/mitigate-alone/out", *PAPER, "--scale", "first"),
    )
    yield Run(
        "sharded/merge-alone",
        ("merge", *FIXTURES["sharded"], "-o", "sharded/merge-alone/out", *PAPER, "--io", "pread"),
    )
    yield Run(
        "sharded/dry-run",
        ("merge", *FIXTURES["sharded"], "-o", "sharded/dry-run/out", *PAPER, "--dry-run", "--json"),
    )
    for name in ("lora", "dora", "tuned"):
        case = f"{name}/to-lora"
        yield Run(
            case,
            (
                "mitigate",
                *FIXTURES[name],
                "-o",
                f"{case}/out",
                *PAPER,
                "--to-lora",
                "6",
                "--lambda",
                "0.5",
                "--json",
            ),
        )
    together = (
        "merge",
        "input/plain",
        "input/several",
        "-o",
        "several/merge/out",
        *PAPER,
        "--lambda",
        "0.5",
        "--json",
    )
    yield Run("several/merge", (*together, "--findings", "several/detect/out"))
    yield Run(
        "refused/lambda", ("merge", *lora, "-o", "refused/lambda/out", "--lambda", "1.5", "--json")
    )
    yield Run(
        "refused/lambda-text", ("merge", *lora, "-o", "refused/lambda/out", "--lambda", "half")
    )
    yield Run(
        "refused/shape",
        ("detect", "input/other", lora[1], "-o", "refused/shape/out.safetensors", "--json"),
    )
    yield Run(
        "refused/adapter",
        ("detect", "input/plain", "input/no-adapter", "-o", "refused/adapter/out.safetensors"),
    )
    other = (*PAPER, "--findings", "dora/detect/out.safetensors")
    yield Run("refused/findings", ("merge", *lora, "-o", "refused/findings/out", *other))


def last_runs() -> Iterator[Run]:
    """One output again and again, in this order: made, there already, another refused, overwritten."""
    findings = (*PAPER, "--findings", "lora/detect/out.safetensors", "--json")
    for case, *options in (
        ("made", "0.5"),
        ("same", "0.5"),
        ("other", "0"),
        ("overwritten", "0", "--overwrite"),
    ):
        yield Run(
            f"again/{case}",
            ("merge", *FIXTURES["lora"], "-o", "again/out", *findings, "--lambda", *options),
        )


# Digests


def without_measured(tree: Any) -> Any:
    """Printed JSON less the keys of `MEASURED`, wherever they stand."""
    if isinstance(tree, dict):
        return {k: without_measured(v) for k, v in tree.items() if k not in MEASURED}
    return [without_measured(v) for v in tree] if isinstance(tree, list) else tree


def normalised(text: str) -> str:
    """What was printed, less what is measured."""
    if text.startswith("{"):
        return json.dumps(without_measured(json.loads(text)), indent=1, ensure_ascii=False)
    return TIMES.sub(r"\1 TIME", FORECAST.sub("FORECAST\n", text))


def execute(run: Run, home: Path) -> None:
    """Run a command in the working directory; what it prints and its exit code are written beside its output."""
    (home / run.name).mkdir(parents=True, exist_ok=True)
    threads = ("--threads", "2") if run.line[0] in ("detect", "mitigate", "merge") else ()
    line = ["streamer", *run.line, *threads]
    done = subprocess.run(line, cwd=home, env=ENV, capture_output=True, text=True, check=False)
    printed = {
        "exit": str(done.returncode),
        "stdout": normalised(done.stdout),
        "stderr": normalised(done.stderr),
    }
    for name, text in printed.items():
        (home / run.name / name).write_text(text)


def iterate(home: Path) -> None:
    """Write down all that `streamer.iter_merged` yields: names, dtypes, shapes and digests of bytes, in order."""
    jobs = json.dumps(
        [(*inputs, f"{name}/detect/out.safetensors") for name, inputs in FIXTURES.items()]
    )
    with open(home / "iter_merged.json", "w") as file:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ITERATE, jobs],
            cwd=home,
            env=ENV,
            stdout=file,
            check=True,
        )


def digests(home: Path, jobs: int) -> dict[str, str]:
    """SHA-256 of every file that comes about, by name; first the version's."""
    write_inputs(home / "input")
    for runs, workers in ((first_runs(), jobs), (later_runs(), jobs), (last_runs(), 1)):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda run: execute(run, home), runs))
    iterate(home)
    files = sorted(
        (p for p in home.rglob("*") if p.is_file()), key=lambda p: (p.parent.name != "version", p)
    )
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def compare(before: Path, now: dict[str, str]) -> int:
    """Print what differs from a list; 1 where anything does."""
    old = {
        name: digest
        for digest, name in (line.split("  ", 1) for line in before.read_text().splitlines())
    }
    different = [name for name in {**old, **now} if old.get(name) != now.get(name)]
    for name in different:
        print("new    " if name not in old else "missing" if name not in now else "differs", name)
    print(f"{len(different)} of {len({**old, **now})} differ", file=sys.stderr)
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="LIST",
        help="print what differs from this list, not the digests",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this new directory, and keep it"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="commands at a time (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare {args.compare}: no such file")
    home = args.keep or Path(tempfile.mkdtemp(prefix="digests-"))
    if args.keep:
        home.mkdir(parents=True)
    try:
        now = digests(home.resolve(), args.jobs)
    finally:
        if not args.keep:
            shutil.rmtree(home)
    if args.compare:
        return compare(args.compare, now)
    for name, digest in now.items():
        print(f"{digest}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
