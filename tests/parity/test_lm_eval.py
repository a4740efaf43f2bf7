"""lm-evaluation-harness with ``--model streamer``: what it says with ``--model hf`` of merged models, on tasks with local data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from causal_models import CAUSAL
from pairs import make_pair, merge
from seeds import vary
from tokenized_texts import WORDS, lines, save

import streamer
from streamer.measuring import batches

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not installed: extra [lm-eval]",
    ),
]

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}metric_list:
{metrics}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\n'
TASKS = {
    "choices": ("multiple_choice", CHOICES, ["acc", "acc_norm"]),
    "few_shots": ("multiple_choice", CHOICES + "num_fewshot: 2\nfewshot_split: test\n", ["acc"]),
    "last_word": ("loglikelihood", "", ["acc", "perplexity"]),
    "whole": ("loglikelihood_rolling", "", ["word_perplexity", "bits_per_byte"]),
}


RUNNER = """
import json, sys
from pathlib import Path
import streamer.lm_eval
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
where, found = Path(sys.argv[1]), []
tasks = TaskManager(include_path=str(where / "tasks"), include_defaults=False)
for run in json.loads(sys.argv[2]):
    print("run", run, file=sys.stderr)
    try:
        done = simple_evaluate(**run, task_manager=tasks, device="cpu", batch_size=4, bootstrap_iters=0)
        samples = {name: [s["filtered_resps"] for s in own] for name, own in done["samples"].items()}
        found.append({"results": done["results"], "samples": samples})
    except Exception as e:
        found.append({"error": str(e)})
(where / "found.json").write_text(json.dumps(found, default=str))
"""


def harness(home: Path, *runs: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """What it finds in each run, in one process, and what each run writes on stderr."""
    command = [sys.executable, "-c", RUNNER, str(home), json.dumps(runs, default=str)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(home), check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "found.json").read_text()), done.stderr.split("run {")[1:]


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("harness")
    make_pair("llama", home, CAUSAL["llama"][2], lora_alpha=2)  # of 16, hf is off by 6e-4 itself
    save(home / "base", "words")
    streamer.detect_intruder_dimensions(
        home / "base", home / "adapter", home / "f.safetensors", top_k=4
    )
    (home / "tasks").mkdir()
    rng = random.Random(vary(5))

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    for name, (kind, more, metrics) in TASKS.items():
        docs = [
            {
                "question": words(1, 6),
                "choices": sorted({words(1, 4) for _ in range(4)}),
                "answer": 0,
            }
            for _ in range(9)
        ]
        if not more:
            docs = [
                {"question": words(1, 6), "answer": " " + words(1, 80 if name == "whole" else 2)}
                for _ in range(9)
            ]
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        data = lines(home / "tasks" / f"{name}.jsonl", *docs)
        (home / "tasks" / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, more=more, metrics=listed)
        )
    return home


@pytest.mark.parametrize(("name", "fewer"), [("llama", 0), ("gpt2", 1), ("gpt-j", 1)])
def test_the_context_is_that_of_hf_where_one_more_position_does_no_harm(
    name: str, fewer: int, tmp_path: Path
) -> None:
    from streamer.lm_eval import StreamerLM

    cls, base, adapter = make_pair(name, tmp_path, CAUSAL[name][2])
    save(base, "words")
    model = StreamerLM(str(base), str(adapter))
    positions = cls.from_pretrained(base).config.max_position_embeddings
    assert model.max_length == positions - fewer


def test_a_cache_has_no_answers_of_another_config(tmp_path: Path) -> None:
    from streamer.lm_eval import StreamerLM

    _, base, adapter = make_pair("llama", tmp_path, CAUSAL["llama"][2])
    save(base, "words")

    def answers(**cache: str) -> list[tuple[float, bool]]:
        return StreamerLM(str(base), str(adapter), **cache)._loglikelihood_tokens(
            [(None, [3, 4], [5, 6])], True
        )

    kept = {"cache": str(tmp_path / "cache.sqlite")}
    before = answers(**kept)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert answers(**kept)[0][0] == pytest.approx(answers()[0][0], abs=1e-4)
    assert answers()[0][0] != pytest.approx(before[0][0], abs=1e-2)


def test_a_killed_run_keeps_the_answers_of_the_sweeps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamer import lm_eval

    _, base, adapter = make_pair("llama", tmp_path, CAUSAL["llama"][2])
    save(base, "words")
    requests = [(None, [3, 4], [5, *range(6, 6 + n)]) for n in range(4)]
    sweeps = [0]
    measure = lm_eval.measure

    def answers(**cache: str) -> list[tuple[float, bool]]:
        return lm_eval.StreamerLM(str(base), str(adapter), **cache)._loglikelihood_tokens(
            requests, True
        )

    def killed(*args: Any) -> Any:
        sweeps[0] += 1
        if sweeps[0] == 3:
            raise KeyboardInterrupt
        return measure(*args)

    whole = answers()
    kept = {"cache": str(tmp_path / "cache.sqlite")}
    monkeypatch.setattr(lm_eval, "SWEPT_TOKENS", 1)
    monkeypatch.setattr(batches, "MOST_ROWS", 1)
    monkeypatch.setattr(lm_eval, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        answers(**kept)
    assert [loss for loss, _ in answers(**kept)] == pytest.approx(
        [loss for loss, _ in whole], abs=1e-5
    )
    assert sweeps == [5]  # three, and two that were left


def test_it_says_what_hf_says_of_merged_models(home: Path) -> None:
    """Accuracies are equal, log-likelihoods to 1e-4; the variants of one set are measured once, by the run that comes first."""
    merged = {"base": home / "base"}
    for method, lam in (("adapter", 1.0), ("paper", 0.5), ("shrink", 0.5)):
        merged[method] = home / f"merged-{method}"
        options = (
            {"method": "paper", "findings": home / "f.safetensors"}
            if method == "paper"
            else {"method": "shrink"}
        )
        merge(home / "base", home / "adapter", merged[method], lam, **options)
        save(merged[method], "words")
    given = {"base": home / "base", "adapter": home / "adapter", "findings": home / "f.safetensors"}
    together = {"cache": home / "cache.sqlite", "methods": ["paper", "shrink"], "lambdas": [0.5]}
    strength = {"paper": {"lambda": 0.5}, "shrink": {"lambda": 0.5}}
    ours = [
        {
            "model": "streamer",
            "model_args": {**given, **together, "method": m, **strength.get(m, {})},
        }
        for m in merged
    ]
    hf = [
        {"model": "hf", "model_args": {"pretrained": path, "dtype": "float32"}}
        for path in merged.values()
    ]
    alone = {
        "model": "streamer",
        "model_args": {**given, "method": "shrink", "lambda": 0.5, "max_memory": "2G"},
    }
    runs, errors = harness(home, *({**run, "tasks": list(TASKS)} for run in [*ours, *hf, alone]))
    assert ["Scored requests" in err for err in errors] == [True, *[False] * 7, True]
    assert runs[3]["results"]["choices"] == runs.pop()["results"]["choices"]
    for found, expected in zip(runs[:4], runs[4:], strict=True):
        for name, (_, _, metrics) in TASKS.items():
            for mine, theirs in zip(found["samples"][name], expected["samples"][name], strict=True):
                if name == "whole":
                    assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
                    continue
                for (own, greedy), (other, taken) in zip(mine, theirs, strict=True):
                    assert (greedy, own) == (taken, pytest.approx(other, abs=1e-4)), name
            for metric in metrics:
                own, other = (run["results"][name][f"{metric},none"] for run in (found, expected))
                assert own == (
                    other if metric.startswith("acc") else pytest.approx(other, rel=1e-5)
                )


def test_what_it_refuses(home: Path) -> None:
    text = TASK.format(
        name="written",
        data=home / "tasks" / "choices.jsonl",
        kind="generate_until",
        more="",
        metrics="  - metric: bleu",
    )
    (home / "tasks" / "written.yaml").write_text(text)
    given = {"base": home / "base", "adapter": home / "adapter"}
    cases = (
        (
            "written",
            {},
            "task 'written' generates text (generate_until), but --model streamer only scores log-likelihoods",
        ),
        (
            "choices",
            {"method": "shrink"},
            "expected method, lambda and keep of one variant of base, adapter, shrink 0.75, ",
        ),
        (
            "choices",
            {"max_length": 1},
            "expected tokens before the continuation, and 1 to 1 (max_length) in it, found ",
        ),
    )
    runs, _ = harness(
        home,
        *(
            {"model": "streamer", "model_args": {**given, **more}, "tasks": [task]}
            for task, more, _ in cases
        ),
    )
    for run, (*_, words) in zip(runs, cases, strict=True):
        assert words in run["error"]


def test_its_command_line(home: Path) -> None:
    args = f"base={home / 'base'},adapter={home / 'adapter'},method=shrink,lambda=0.5"
    for more, code, words in (
        ("", 0, "|choices|"),
        (",lambda=abc", 2, "error: lambda: expected a number, such as 0.5, found 'abc'"),
        (
            f",cache={home / 'absent' / 'c.sqlite'}",
            2,
            "c.sqlite (unable to open database file); name a new file in a directory",
        ),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "streamer.lm_eval",
                "--model",
                "streamer",
                "--model_args",
                args + more,
                "--tasks",
                "choices",
                "--include_path",
                str(home / "tasks"),
            ],
            capture_output=True,
            text=True,
            env=environment(home),
            check=False,
        )
        assert (done.returncode, words in done.stdout + done.stderr) == (code, True), done.stderr
