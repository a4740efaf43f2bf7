"""Score requests of lm-evaluation-harness on variants of an adapter without loading the base: a model type for the harness.

    python -m streamer.lm_eval --model streamer --model_args base=BASE,adapter=ADAPTER,method=shrink,lambda=0.75 --tasks arc_easy

runs the harness's own command line with the model type registered. In Python, import this module before `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from tqdm import tqdm

from streamer.api.calls import watched
from streamer.api.texts import VariantsRequest
from streamer.errors import StreamerError, UnsupportedError, UsageError
from streamer.evaluation.evaluate import open_variants
from streamer.events import Monitor
from streamer.linalg.torch_state import full_float32
from streamer.measuring.batches import MOST_ROWS, Work, batches, needs_one_length
from streamer.measuring.losses import SweepProgress, measure
from streamer.measuring.sequences import TextSequences
from streamer.measuring.tokenizer import load_tokenizer, tokenizer_directory
from streamer.options import VariantOptions
from streamer.plan.plan import AdapterBatch, resident_bytes
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.variants import ADAPTER, BASE, Variant
from streamer.units import quoted

KEYWORDS = {f.name for f in fields(VariantOptions)} - {
    "base",
    "adapter",
    "on_event",
    "monitor",
    "progress",
}
"""Keywords of `evaluate_variants` that have an effect here."""

SWEPT_TOKENS = 8192
"""Tokens of all variants that ride in a sweep, whose results are stored before the next."""

HARNESS_TEXT = "requests"
"""Name of the requests as a text, in messages."""

RESULTS = "create table if not exists results (key blob primary key, loss real, greedy integer) without rowid"
"""Statement that makes the table of a cache."""


class Question(NamedTuple):
    """The tokens of a request, and how many of them, at the end, are scored: the continuation."""

    ids: np.ndarray
    scored: int


Answer = tuple[float, bool]  # not a class: the harness's cache pickles it
"""Log-likelihood of a continuation, and whether all its tokens are the likeliest ones."""


@register_model("streamer")
class StreamerLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A variant of an adapted model, for tasks that are scored by log-likelihoods.

    Parameters
    ----------
    base, adapter
        Directories of the base and the adapter.
    method
        ``base``, ``adapter`` (the default), or a mitigation method, whose strength is ``lambda``, or ``keep`` for a fit.
    cache
        File of results by model, variant and tokens; made if it does not exist. With a cache, the base, the adapter and all variants of
        ``methods`` and ``lambdas`` (several values joined by ``+``) are measured in the same sweeps, and later runs find their results.
    max_length
        Most tokens of a sequence, not counting the last; longer sequences lose their first tokens. By default, as in the model's config.
    options
        Keywords of `evaluate_variants`, such as ``findings``, ``max_memory`` and ``coefficients``; ``lambda``; and the harness's own:
        ``device``, whose default ``cuda:0`` means ``auto`` here, and ``batch_size`` and ``max_batch_size``, which are ignored.
    """

    def __init__(
        self,
        base: str,
        adapter: str,
        method: str = ADAPTER,
        cache: str | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        lam = options.pop("lambda", None)
        keep = options.get("keep")
        keywords = {
            k: v
            for k, v in options.items()
            if k not in ("batch_size", "max_batch_size") and v is not None
        }
        if (
            keywords.get("device") == "cuda:0"
        ):  # the harness's default, even on a machine without a GPU
            keywords["device"] = "auto"
        if unknown := sorted(keywords.keys() - KEYWORDS):
            raise UsageError(
                f"model_args: expected keywords of evaluate_variants, found {unknown[0]!r}"
            )
        if "methods" in keywords:
            keywords["methods"] = tuple(map(str, _several(keywords["methods"])))
        if "lambdas" in keywords:
            keywords["lambdas"] = tuple(
                _number("lambdas", value) for value in _several(keywords["lambdas"])
            )
        several = "methods" in keywords or method not in (BASE, ADAPTER)
        if several:
            keywords.setdefault("methods", (method,))
        if lam is not None:
            lam = _number("lambda", lam)
            keywords.setdefault("lambdas", (lam,))
        request = VariantsRequest(base=base, adapter=adapter, **keywords)
        self._variants = request.variants if several else request.variants[:2]
        self._variant = _requested(self._variants, method, lam, keep)
        with watched(request) as monitor:
            base_path, adapter_path, findings, run = request.opened(
                adapter, request.findings, monitor
            )
            self._model = open_variants(
                base_path, adapter_path, findings, request, request.variants, run
            )
        self._run = run
        self._max_memory = request.memory
        plan = self._model.job.plan
        directory = tokenizer_directory(plan)
        self.tokenizer = load_tokenizer(Path(HARNESS_TEXT), directory).loaded
        config = require_transformers().AutoConfig.from_pretrained(
            plan.base.directory, local_files_only=True
        )
        # Unlike `hf`, this also runs the last token of a request.
        positions = (self._model.positions or sys.maxsize) - self._model.strict_positions
        self.max_length = max_length or min(resolve_max_length(config, self.tokenizer), positions)
        self._cache = cache
        with _using(cache):
            self._results = sqlite3.connect(":memory:" if cache is None else cache)
            self._results.execute(RESULTS)
            self._results.execute("select key, loss, greedy from results limit 1")

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token from which a text is predicted if nothing precedes it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text as the harness's ``hf`` does: with the tokenizer's special tokens, unless the text already begins with one."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        kinds = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **kinds))

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, for the harness's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation by the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate text."""
        task = getattr(requests[0], "task_name", None) if requests else None
        raise UnsupportedError(
            f"task {task!r} generates text (generate_until), but --model streamer only scores log-likelihoods; merge the adapter and use "
            "--model hf"
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, computed in windows if the text is longer than the model's context."""
        windows = [
            [
                utils.make_disjoint_window(w)
                for w in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        answers = iter(
            self._loglikelihood_tokens(
                [(None, *w) for of_text in windows for w in of_text], disable_tqdm
            )
        )
        totals = [
            sum(log_likelihood for log_likelihood, _ in islice(answers, len(of_text)))
            for of_text in windows
        ]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Answer]:
        """Answer requests, each a text with the tokens of its context and continuation; measure the answers not yet known."""
        questions = []
        for text, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"request {quoted(str(text))}: expected tokens before the continuation, and 1 to {self.max_length} (max_length) in it, "
                    f"found {len(context)} and {len(continuation)}"
                )
            ids = np.array([*context, *continuation][-self.max_length - 1 :], np.int64)
            questions.append(Question(ids, len(continuation)))
        new = {
            self._key(self._variant, question): question
            for question in questions
            if self._find(question) is None
        }
        if new:
            self._measure(list(new.values()), disable_tqdm)
        answers = []
        for (text, _context, _continuation), question in zip(requests, questions, strict=True):
            answer = self._find(question)
            assert answer is not None
            answers.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _find(self, question: Question) -> Answer | None:
        key = self._key(self._variant, question)
        row = self._results.execute(
            "select loss, greedy from results where key = ?", (key,)
        ).fetchone()
        return None if row is None else (-row[0], bool(row[1]))

    def _key(self, variant: Variant, question: Question) -> bytes:
        tokens = question.scored.to_bytes(8, "little") + question.ids.astype("<i8").tobytes()
        return hashlib.sha256(self._keys[variant.name] + tokens).digest()

    @cached_property
    def _keys(self) -> dict[str, bytes]:
        """Hash everything that determines each variant's results, including the inputs' identities and stamps."""
        job = self._model.job
        about = {
            "transformers": require_transformers().__version__,
            "config": self._model.config,
            "stamps": job.plan.detection_stamps(),
            "projected": job.projected,
            "bf16": 2 * job.rounds_products,
        }
        intruders = None if job.findings is None else job.findings.decisions_digest()
        return {
            v.name: bytes.fromhex(
                job.plan.digest(
                    **about,
                    method=v.mitigation and v.mitigation.as_dict(),
                    intruders=intruders if v.scales_intruders else None,
                )
            )
            for v in self._variants
        }

    def _measure(self, questions: Sequence[Question], disable_tqdm: bool) -> None:
        """Run the sweeps that answer requests, and store the results after each sweep."""
        with _using(self._cache), self._results:
            self._results.execute(
                "delete from results where key is null"
            )  # deletes nothing, but fails if not writable
        other = self._variants[1] if self._variant.name == BASE else self._variant
        variants = self._variants if self._cache is not None else (self._variants[0], other)
        counted = tuple(np.arange(len(ids)) >= len(ids) - scored for ids, scored in questions)
        text = TextSequences(tuple(question.ids for question in questions), counted, HARNESS_TEXT)
        model = self._model
        plan = self._model.job.plan
        texts = {HARNESS_TEXT: text}
        resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
        progress = SweepProgress(Monitor(), "evaluate")
        rows = max(SWEPT_TOKENS, len(variants) * max(MOST_ROWS, text.longest))
        work = Work(rows, text.longest)
        limits = work.limits(model.size, resident, self._max_memory)
        model.use(replace(model.job, variants=variants))
        with (
            full_float32(),
            tqdm(total=len(questions), desc="Scored requests", disable=disable_tqdm) as bar,
        ):
            one_length = needs_one_length(model, texts, limits.rows, lambda: None)
            parts = batches(texts, len(variants), model.size, limits.rows, one_length)
            while parts:
                block = [parts.pop(0)]
                while (
                    parts
                    and sum(group.rows for part in (*block, parts[0]) for group in part.groups)
                    <= SWEPT_TOKENS
                ):
                    block.append(parts.pop(0))
                sums = measure(model, block, progress, limits)[HARNESS_TEXT]
                results = [
                    (
                        self._key(variant, questions[i]),
                        sums.loss[v, s],
                        int(sums.right[v, s] == sums.tokens[s]),
                    )
                    for v, variant in enumerate(variants)
                    for s, i in enumerate(sorted(i for part in block for i in part.numbers))
                ]
                with self._results:
                    self._results.executemany(
                        "insert or replace into results values (?, ?, ?)", results
                    )
                bar.update(len(results) // len(variants))


@contextlib.contextmanager
def _using(cache: str | None) -> Iterator[None]:
    """Turn errors of the cache into a message that says what to do."""
    try:
        yield
    except sqlite3.Error as e:
        raise UsageError(
            f"cache: cannot keep results in {cache} ({e}); name a new file in a directory that you can write to"
        ) from None


def _several(value: object) -> Sequence[object]:
    """Split values joined by ``+``; a list stays."""
    return value if isinstance(value, list | tuple) else str(value).split("+")


def _number(name: str, value: object) -> float:
    """Read a number from the model's arguments."""
    try:
        return float(str(value))
    except ValueError:
        raise UsageError(f"{name}: expected a number, such as 0.5, found {quoted(value)}") from None


def _requested(
    variants: Sequence[Variant], method: str, lam: float | None, keep: float | None
) -> Variant:
    """Find the requested variant among the measured ones."""
    fitting = [
        v
        for v in variants
        if method in (v.name, v.method)
        and (lam is None or v.mitigation_lambda == lam)
        and (keep is None or v.keep is None or v.keep == keep)
    ]
    if len(fitting) != 1:
        names = ", ".join(v.name for v in variants)
        stated = json.dumps({"method": method, "lambda": lam, "keep": keep})
        raise UsageError(
            f"model_args: expected method, lambda and keep of one variant of {names}; found {stated}"
        )
    return fitting[0]


def main() -> None:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except StreamerError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(e.exit_code) from None


if __name__ == "__main__":
    main()
