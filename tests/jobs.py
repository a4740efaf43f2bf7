"""Small jobs that are disturbed: commands on small inputs, what they write when nothing goes wrong, and what must hold after a fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import helpers
import torch
from forks import Outcome, Server
from helpers import ENV, MODULES, tree_digest, write_adapter, write_sharded
from safetensors import SafetensorError, safe_open

COMMANDS = ("detect", "merge", "merge --findings", "mitigate", "mitigate --findings")
"""On a base in three shards and its adapter."""


@dataclass(frozen=True)
class Case:
    """A command on a small job, and what it writes when nothing goes wrong."""

    argv: tuple[str, ...]
    """The command line without the output."""
    server: Server = field(compare=False)
    whole: dict[str, str] = field(default_factory=dict)
    """Digests of the whole output tree."""
    calls: tuple[str, ...] = ()
    """The calls that change something on disk, in order."""

    def run(self, out: Path, *options: str, **disturbance) -> Outcome:
        """Run it into a tree; `detect` writes a file in it."""
        return self.server.run(*self.line(out), *options, **disturbance)

    def line(self, out: Path) -> list[str]:
        """The command line that writes into a tree."""
        if self.argv[0] == "detect":
            out.mkdir(exist_ok=True)
        return [*self.argv, "-o", str(out / "findings.safetensors" if self.argv[0] == "detect" else out)]

    def start(self, out: Path) -> subprocess.Popen[str]:
        """Start it as a user does, in a process of its own."""
        line = [sys.executable, "-m", "streamer", *self.line(out), "--threads", "1"]
        return subprocess.Popen(line, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def committed_by(self) -> str:
        """The file that makes the output loadable."""
        last = {"detect": "findings.safetensors", "mitigate": "adapter_config.json"}
        index = "model.safetensors.index.json"
        return last.get(self.argv[0], index if index in self.whole else "model.safetensors")

    def lost(self, out: Path) -> list[str]:
        """P1: what has a final name and is not what an uninterrupted run gives it, or lacks what the commit point stands on."""
        if not out.exists():
            return []
        named = {name: digest for name, digest in tree_digest(out).items() if not Path(name).name.startswith(".")}
        wrong = [name for name, digest in named.items() if self.whole.get(name) != digest]
        wrong += [name for name in named if name.endswith(".safetensors") and not _loads(out / name)]
        if self.committed_by in named:
            wrong += [f"{name} is missing" for name in self.whole.keys() - {"streamer.json"} - named.keys()]
        return wrong

    def check_whole_files(self, out: Path) -> None:
        """`lost` finds nothing."""
        assert self.lost(out) == []

    def unfinished(self, out: Path, *options: str) -> list[str]:
        """P2, P3: what goes wrong when the same command runs again, or differs from an uninterrupted run, hidden files and all."""
        again = self.run(out, *options)
        # A kill after the last rename leaves nothing to do, and the run says so.
        error = again.err.replace(f"streamer: note: {out} holds this very output already; nothing to do\n", "")
        wrong = [f"exit {again.code}: {error}"] if (again.code, error) != (0, "") else []
        now = tree_digest(out)
        return wrong + [name for name in {**now, **self.whole} if now.get(name) != self.whole.get(name)]

    def check_finishes(self, out: Path, *options: str) -> None:
        """`unfinished` finds nothing."""
        assert self.unfinished(out, *options) == []


def _loads(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as f:
            return bool(f.keys())
    except (SafetensorError, OSError):
        return False


def fp8(home: Path) -> tuple[Path, Path]:
    """`helpers.three_shards` with its matrices in FP8, a scale a row."""
    from safetensors.torch import load_file

    plain, adapter = helpers.three_shards(home)
    shards = []
    for path in sorted(plain.glob("*.safetensors")):
        tensors = {}
        for name, t in load_file(path).items():
            if t.dim() == 2:
                scale = (t.float().abs().amax(1, keepdim=True) / 448).bfloat16()
                tensors[name] = (t.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = t
        shards.append(tensors)
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": quantization}
    return write_sharded(home / "fp8", shards, config), adapter


def experts(home: Path) -> tuple[Path, Path]:
    """Stacks of three experts in two shards, and LoRA on them."""
    count, m, n, r = 3, 32, 24, 2
    shards, factors = [], {}
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        stack = torch.stack([helpers.power_law(m, n, seed=10 * layer + e) for e in range(count)])
        shards.append({f"{module}.down_proj": stack.bfloat16()})
        factors[module] = helpers.intruding_factors(m, n, count * r, seed=layer)
    base = write_sharded(home / "experts", shards, {"model_type": "mixtral"})
    parameters = {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.1"}
    return base, write_adapter(home / "on-experts", factors, r=r, **parameters)


def dora(home: Path) -> tuple[Path, Path]:
    """`helpers.three_shards` with magnitudes beside its adapter's factors."""
    base, _ = helpers.three_shards(home)
    factors, magnitudes = {}, {}
    for layer in range(3):
        for i, name in enumerate(MODULES[1:]):
            module, (m, n) = f"model.layers.{layer}.{name}", ((96, 48), (48, 96))[i]
            factors[module] = helpers.intruding_factors(m, n, 4, seed=10 * layer + i)
            magnitudes[f"base_model.model.{module}.lora_magnitude_vector"] = torch.linspace(0.5, 1.5, m)
    return base, write_adapter(home / "dora", factors, r=4, more=magnitudes, use_dora=True)


OTHERS: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "merge into FP8": (fp8, "merge --lambda 0.5"),
    "merge --dequantize": (fp8, "merge --lambda 0.5 --dequantize"),
    "merge of experts": (experts, "merge --lambda 0.5"),
    "merge of DoRA": (dora, "merge --lambda 0.5"),
    "mitigate --to-lora": (dora, "mitigate --lambda 0.5 --to-lora 3"),
}
"""Other outputs: their inputs, and the command."""


class Bench:
    """The inputs and the cases on them, made once each."""

    def __init__(self, home: Path, server: Server, hidden: int = 48) -> None:
        self.base, self.adapter = helpers.three_shards(home, hidden=hidden)
        self.findings = home / "findings.safetensors"
        self._home, self._server = home, server
        self._cases: dict[str, Case] = {}
        assert server.run("detect", self.base, self.adapter, "-o", self.findings).code == 0

    def case(self, command: str) -> Case:
        """The case of one of `COMMANDS` or `OTHERS`."""
        if command not in self._cases:
            out = self._home / command.replace(" ", "-")
            argv = self._argv(command)
            done = Case(argv, self._server).run(out)
            assert (done.code, done.err) == (0, "")
            self._cases[command] = Case(argv, self._server, tree_digest(out), tuple(done.calls))
        return self._cases[command]

    def _argv(self, command: str) -> tuple[str, ...]:
        if command in OTHERS:
            make, line = OTHERS[command]
            base, adapter = make(self._home / f"inputs of {command}")
            verb, *options = line.split()
            return verb, str(base), str(adapter), *options
        verb, *given = command.split()
        options = [] if verb == "detect" else ["--lambda", "0.5"]
        return verb, str(self.base), str(self.adapter), *options, *(["--findings", str(self.findings)] if given else [])
