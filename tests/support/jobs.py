"""Small jobs that are disturbed: commands on small inputs, what they write when nothing goes wrong, and what must hold after a fault."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers
import pipelines
import torch
from command_line import ENV, with_method
from forks import Outcome, Server
from helpers import MODULES, tree_digest, write_adapter, write_sharded
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import max_pool2d

COMMANDS = ("detect", "merge", "merge --findings", "mitigate", "mitigate --findings")
"""On a base in three shards and its adapter."""

NAMES = {
    "detect": "findings.safetensors",
    "evaluate": "evaluation.json",
    "map": "base.map.safetensors",
    "repair": "repaired",
}
"""What a command writes in the tree, if not the tree itself; a repair writes its fit beside the adapter."""


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
    several: bool = False
    """Whether the adapter is a directory of adapters, and the output one of outputs."""
    before: str = ""
    """Code that runs at the beginning of each run."""

    def run(self, out: Path, *options: str, before: str = "", **disturbance) -> Outcome:
        """Run it into a tree."""
        return self.server.run(
            *self.line(out), *options, before=f"{self.before}\n{before}", **disturbance
        )

    def line(self, out: Path) -> list[str]:
        """The command line that writes into a tree."""
        name = "" if self.several else NAMES.get(self.argv[0], "")
        if name:
            out.mkdir(exist_ok=True)
        return [*self.argv, "-o", str(out / name)]

    def start(self, out: Path) -> subprocess.Popen[str]:
        """Start it as a user does, in a process of its own."""
        line = [sys.executable, "-m", "streamer", *with_method(self.line(out)), "--threads", "1"]
        return subprocess.Popen(
            line, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    @property
    def inputs(self) -> list[Path]:
        """The directories that it reads; a text is a file, read once at the beginning."""
        return [Path(arg) for arg in self.argv[1:3] if Path(arg).is_dir()]

    def commits(self) -> dict[str, set[str]]:
        """The files that make outputs loadable, each with those that it stands on."""
        trees = {""}
        found = dict[str, set[str]]()
        if self.argv[0] in NAMES:
            trees = {"repaired/"} if self.argv[0] == "repair" else set()
            found = {name: set() for name in self.whole if not name.startswith(tuple(trees))}
        elif self.several:
            trees = {f"{Path(name).parts[0]}/" for name in self.whole}
        for home in trees:
            beside = {name for name in self.whole if name.startswith(home)} - {
                f"{home}streamer.json"
            }
            of_pipeline = (f"{home}text_encoder/model.safetensors", f"{home}{pipelines.LORA}")
            of_model = (f"{home}model.safetensors.index.json", f"{home}model.safetensors")
            last = (f"{home}adapter_config.json", *of_model, *of_pipeline)
            found[next(name for name in last if name in beside)] = beside
        return found

    def committed(self, out: Path) -> bool:
        """Whether all outputs are loadable."""
        return all((out / name).exists() for name in self.commits())

    def lost(self, out: Path) -> list[str]:
        """P1: what has a final name and is not what an uninterrupted run gives it, or lacks what the commit point stands on."""
        if not out.exists():
            return []
        named = {
            name: digest
            for name, digest in tree_digest(out).items()
            if not Path(name).name.startswith(".")
        }
        wrong = [name for name, digest in named.items() if self.whole.get(name) != digest]
        wrong += [
            name for name in named if name.endswith(".safetensors") and not _loads(out / name)
        ]
        for commit, names in self.commits().items():
            if commit in named:
                wrong += [f"{name} is missing" for name in names - named.keys()]
        return wrong

    def check_whole_files(self, out: Path) -> None:
        """`lost` finds nothing."""
        assert self.lost(out) == []

    def unfinished(self, out: Path, *options: str) -> list[str]:
        """P2, P3: what goes wrong when the same command runs again, or differs from an uninterrupted run, hidden files and all."""
        again = self.run(out, *options)
        # Notes aside: a kill after the last rename leaves nothing to do, and the run says so.
        wrong = [f"exit {again.code}: {again.told}"] if (again.code, again.told) != (0, "") else []
        now = tree_digest(out)
        return wrong + [
            name for name in {**now, **self.whole} if now.get(name) != self.whole.get(name)
        ]

    def check_finishes(self, out: Path, *options: str) -> None:
        """`unfinished` finds nothing."""
        assert self.unfinished(out, *options) == []


def _loads(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as f:
            return bool(f.keys())
    except (SafetensorError, OSError):
        return False


def fp8(home: Path, hidden: int = 48, block: tuple[int, int] | None = None) -> tuple[Path, Path]:
    """`helpers.three_shards` with its matrices in FP8, a scale a row, or a block as transformers states it."""
    from safetensors.torch import load_file

    plain, adapter = helpers.three_shards(home, hidden=hidden)
    shards = []
    for path in sorted(plain.glob("*.safetensors")):
        tensors = {}
        for name, t in load_file(path).items():
            if t.dim() == 2 and block:
                scale = max_pool2d(t.float().abs()[None], block, ceil_mode=True)[0] / 448
                of_each = scale.repeat_interleave(block[0], 0)[: len(t)].repeat_interleave(
                    block[1], 1
                )[:, : t.shape[1]]
                tensors[name] = (t.float() / of_each).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scale
            elif t.dim() == 2:
                scale = (t.float().abs().amax(1, keepdim=True) / 448).bfloat16()
                tensors[name] = (t.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = t
        shards.append(tensors)
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
    }
    if block:
        quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": quantization}
    return write_sharded(home / "fp8", shards, config), adapter


def experts(home: Path) -> tuple[Path, Path]:
    """Stacks of three experts in two shards, and LoRA on them."""
    count = 3
    m = 32
    n = 24
    r = 2
    shards = []
    factors = {}
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
    factors = {}
    magnitudes = {}
    for layer in range(3):
        for i, name in enumerate(MODULES[1:]):
            module, (m, n) = f"model.layers.{layer}.{name}", ((96, 48), (48, 96))[i]
            factors[module] = helpers.intruding_factors(m, n, 4, seed=10 * layer + i)
            magnitudes[f"base_model.model.{module}.lora_magnitude_vector"] = torch.linspace(
                0.5, 1.5, m
            )
    return base, write_adapter(home / "dora", factors, r=4, more=magnitudes, use_dora=True)


def several(home: Path) -> tuple[Path, Path]:
    """A directory of three adapters: LoRA, DoRA on some of its modules, and LoRA with weights of its own in the base's place."""
    base, plain = helpers.three_shards(home)
    adapters = home / "adapters"
    adapters.mkdir()
    plain.rename(adapters / "lora")
    dora(home / "more")[1].rename(adapters / "dora")
    layer = "model.layers.1"
    own = {
        f"base_model.model.{layer}.mlp.up_proj.base_layer.weight": helpers.power_law(
            96, 48, seed=7
        ).float(),
        **{
            f"base_model.model.model.layers.{i}.input_layernorm.weight": torch.full((48,), 1.5)
            for i in range(3)
        },
    }
    factors = {
        f"{layer}.{name}": helpers.intruding_factors(*shape, 3, seed=5)
        for name, shape in SHAPES.items()
    }
    write_adapter(
        adapters / "saved", factors, r=3, more=own, modules_to_save=[f"{layer}.input_layernorm"]
    )
    return base, adapters


def pipeline(home: Path) -> tuple[Path, Path]:
    """A diffusers pipeline and its adapter."""
    base = pipelines.write_pipeline(home / "pipeline")
    adapter = home / "lora"
    adapter.mkdir()
    save_file(pipelines.lora("plain")[0], adapter / pipelines.LORA)
    return base, adapter


SHAPES = {"self_attn.q_proj": (48, 48), "mlp.up_proj": (96, 48)}

OTHERS: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "merge into FP8": (fp8, "merge --lambda 0.5"),
    "merge --dequantize": (fp8, "merge --lambda 0.5 --dequantize"),
    "merge of experts": (experts, "merge --lambda 0.5"),
    "merge of DoRA": (dora, "merge --lambda 0.5"),
    "mitigate --to-lora": (dora, "mitigate --lambda 0.5 --to-lora 3"),
    "detect of several": (several, "detect"),
    "merge of several": (several, "merge --lambda 0.5"),
    "merge of a pipeline": (pipeline, "merge --lambda 0.5"),
    "mitigate of a pipeline": (pipeline, "mitigate --lambda 0.5"),
}
"""Other outputs: their inputs, and the command."""


MODELS = {
    "evaluate": "base adapter --general general.npy --task task.npy --method shrink --lambda 0.5",
    "map": "base --general general.npy",
    "repair": "base adapter --general general.npy --task task.npy",
}
"""Commands that run a model: their inputs and options, the files by their names in the directory of the inputs."""


class Bench:
    """The inputs and the cases on them, made once each."""

    def __init__(self, home: Path, server: Server, hidden: int = 48) -> None:
        self.base, self.adapter = helpers.three_shards(home, hidden=hidden)
        self.findings = home / "findings.safetensors"
        self._home = home
        self._server = server
        self._cases: dict[str, Case] = {}
        assert server.run("detect", self.base, self.adapter, "-o", self.findings).code == 0

    def case(self, command: str) -> Case:
        """The case of one of `COMMANDS`, `OTHERS` or `MODELS`."""
        if command not in self._cases:
            out = self._home / command.replace(" ", "-")
            argv = self._argv(command)
            together = command.endswith("of several")
            done = Case(argv, self._server, several=together).run(out)
            assert (done.code, done.told) == (0, "")
            self._cases[command] = Case(
                argv, self._server, tree_digest(out), tuple(done.calls), together
            )
        return self._cases[command]

    def _argv(self, command: str) -> tuple[str, ...]:
        if command in MODELS:
            from learned import make_learned

            home = self._home / "learned"
            if not home.exists():
                home.mkdir()
                make_learned(home, 24, 16)
            files = {
                name: str(home / name) for name in ("base", "adapter", "general.npy", "task.npy")
            }
            words = [files.get(word, word) for word in MODELS[command].split()]
            return command, *words, "--sequences", "24", "-qq"  # texts this short cause warnings
        if command in OTHERS:
            make, line = OTHERS[command]
            base, adapter = make(self._home / f"inputs of {command}")
            verb, *options = line.split()
            return verb, str(base), str(adapter), *options
        verb, *given = command.split()
        options = [] if verb == "detect" else ["--lambda", "0.5"]
        return (
            verb,
            str(self.base),
            str(self.adapter),
            *options,
            *(["--findings", str(self.findings)] if given else []),
        )
