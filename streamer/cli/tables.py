"""Return what a command found as a JSON object, and for people as tables that fit the screen and the next steps."""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamer.api import shown, views
from streamer.cli.terminal import Result, screen
from streamer.events import Monitor
from streamer.options import EvaluateOptions
from streamer.tables import NO_LIMIT, Column, Screen, fit, shorten, table
from streamer.units import counted, format_duration, format_size, listed

if TYPE_CHECKING:
    from streamer.api.report import Report
    from streamer.api.texts import RepairRecord
    from streamer.detection.findings import Findings, MatrixFinding
    from streamer.evaluation.evaluation import Evaluation


def forecast_text(command: str, forecast: Mapping[str, Any], free: int) -> str:
    """Format one command's forecast in one line."""
    sizes = {
        key.removesuffix("_bytes"): format_size(size) if size else ""
        for key, size in forecast.items()
        if key.endswith("_bytes")
    }
    memory = sizes["peak_memory"]
    if forecast["escalated_memory_bytes"] > forecast["peak_memory_bytes"]:
        memory += f", {sizes['escalated_memory']} if the dense solver, or float64, must decide"
    elif sizes["device_memory"]:
        memory += f", of it {sizes['device_memory']} on the GPU"
    reads = format_size(forecast["read_bytes"])
    if sizes["network"]:
        reads += f" ({sizes['network']} over the network)"
    writes = format_size(forecast["write_bytes"])
    if command == "detect":
        writes = f"at most {writes}"
    if sizes["temporary"]:
        writes += f" and at most {sizes['temporary']} temporarily"
    time = "not estimated"
    if forecast["seconds"] is not None:
        time = f"about {format_duration(forecast['seconds'])}"
    if forecast["seconds"]:
        threads = counted(forecast["threads"], "thread")
        time += f", on {threads}, within a factor of 3 if load and disk stay as they are"
    return f"forecast: memory {memory}; reads {reads}, writes {writes}; {format_size(free)} free; time {time}"


def dry_run_text(record: Mapping[str, Any], command: str, screen: Screen) -> str:
    """Describe what a run would write and need, for one output or those of several adapters."""
    adapters = record.get("adapters")
    tree = record["forecast"]
    forecast = "" if tree is None else forecast_text(command, tree, record["free_bytes"])
    if adapters is None:
        return fit(f"{_line(record)}\n{forecast}".rstrip(), screen.width)
    parts = [f"{name}\n{_line(run)}" for name, run in adapters.items()]
    if forecast:
        parts.append(f"all together\n{fit(forecast, screen.width)}")
    return "\n\n".join(parts)


WOULD = {
    "new": "would write",
    "resume": "would resume",
    "done": "nothing to do: it exists already",
}


def _line(run: Mapping[str, Any]) -> str:
    files = counted(run["files"], "file")
    if run["bytes"] is not None:
        files += f", {format_size(run['bytes'])}"
    matrices = counted(run["matrices"], "matrix")
    return f"dry run: {WOULD[run['state']]} {run['output']}: {files}; {matrices}"


MANY = 20
"""Most rows of a table that is shown whole without `--all`."""

SHOWN = 10
"""Rows that are shown of a longer one, the most important ones."""


def findings_table(
    findings: Findings,
    screen: Screen = NO_LIMIT,
    written: Path | None = None,
    state: str = "written",
) -> str:
    """Format findings: one line for each matrix, or the ten with the most intruder energy; totals; and the file written."""
    matrices = sorted(findings, key=lambda m: views.natural(m.tensor))
    chosen, cut = _most(
        matrices, lambda m: (m.detection.intruder_energy, len(m.detection.intruders)), screen
    )
    options = findings.options
    undecided = [m for m in matrices if not m.detection.certified]
    with_any = sum(bool(m.detection.intruders) for m in findings)
    summary = (
        f"{findings.intruders} intruders in {with_any} of {len(findings)} matrices "
        f"(top_k={options.top_k}, epsilon={options.threshold_epsilon}); {len(findings) - len(undecided)} of {len(findings)} certified"
    )
    if turned := sum(bool(m.transposed) for m in findings):
        summary += f"\n{turned} stored as columns x rows (embeddings, Conv1D); decisions still use the output side"
    if undecided:
        names = [m.tensor for m in undecided]
        names[:3] = shorten(names[:3], (screen.width or 10**6) - 4)
        summary += (
            f"\nnot certified: {listed(names)}; an open direction does not count as an intruder; another --epsilon may "
            "settle it"
        )
        if short := sum(map(_lacked_memory, undecided)):
            summary += f"\n{short} of these for lack of memory: with a larger --max-memory, a full SVD or float64 may settle them"
    if written is not None:
        summary += f"\n{state_line(written, state)}: {format_size(written.stat().st_size)}"
    return screen.join(
        table(findings.columns(chosen), screen),
        [_cut(cut, len(findings), "most energy")],
        [summary],
    )


def _lacked_memory(matrix: MatrixFinding) -> bool:
    """Test whether a full SVD or float64 might decide what stayed open."""
    detection = matrix.detection
    may_repeat = detection.precision == "float32" and views.is_repeated(matrix.shape)
    return detection.solver == "certified" or may_repeat


def state_line(where: object, state: str) -> str:
    """State whether a run wrote an output, found it there, or only reads it."""
    return {"read": f"{where}", "present": f"{where} exists already"}.get(state, f"wrote {where}")


def next_step(
    findings: Findings, screen: Screen, base: str = "BASE", adapter: str = "ADAPTER"
) -> str:
    """Give the command that makes the adapter forget less: a repair, or of a pipeline, which no repair runs, a shrink."""
    options = views.input_options({"base": findings.base, "adapter": findings.adapter})
    is_pipeline = any("/" in file["file"] for file in findings.base.get("files", ()))
    command = "mitigate" if is_pipeline else "repair"
    method = "--method shrink --lambda 0.75 " if is_pipeline else ""
    line = f"next: streamer {command} {shlex.join([base, adapter])} {method}-o OUTPUT"
    return fit(f"{line} {shlex.join(options)}".rstrip(), screen.width)


def record_table(record: Mapping[str, Any], where: str, screen: Screen = NO_LIMIT) -> str:
    """Format a record: totals and matrices, or the ten matrices that changed most if there are many."""
    matrices = sorted(record["matrices"], key=lambda m: views.natural(m["tensor"]))
    chosen, cut = _most(
        matrices,
        lambda m: (abs(m["delta_norm"] ** 2 - m["delta_norm_after"] ** 2), m["delta_norm"]),
        screen,
    )
    columns = [
        Column("matrix", [m["tensor"] for m in chosen], left=True, names=True),
        *_norms(chosen, priority=1),
    ]
    if views.takes_findings(record["method"]):
        scaled = [str(len(m["intruders"])) for m in chosen]
        columns.insert(1, Column("scaled", scaled, "intruders that were scaled", priority=2))
    if record["command"] == "mitigate":
        lost = [f"{100 * m['dropped']:.2f}%" for m in chosen]
        about = (
            "lost in projection: share of the mitigated delta that the adapter's rank cannot hold"
        )
        columns.append(Column("lost", lost, about, priority=4))
    lines = views.record_lines(record, state_line(where, record["state"]))
    return screen.join(
        table(columns, screen) if chosen else "",
        [_cut(cut, len(matrices), "largest change")],
        [*lines, *record.get("measured", ())],
    )


def adapters_table(trees: Mapping[str, Mapping[str, Any]], screen: Screen = NO_LIMIT) -> str:
    """Format results for several adapters, one line for each, from the objects that `--json` prints."""
    totals = [tree["totals"] for tree in trees.values()]
    columns = [
        Column("adapter", list(trees), left=True, names=True, foot="all together"),
        _summed("matrices", [x["matrices"] for x in totals], "", 1),
    ]
    if all("method" in tree for tree in trees.values()):
        about = "matrices whose delta differs from the adapter's"
        columns.append(_summed("mitigated", [x["changed"] for x in totals], about, 3))
        if any(views.takes_findings(tree["method"]) for tree in trees.values()):
            scaled = [x["intruders"] for x in totals]
            columns.append(_summed("scaled", scaled, "intruders that were scaled", 5))
        sizes = [x["bytes"] for x in totals]
        size = Column("size", [*map(format_size, sizes)], "", 6, foot=format_size(sum(sizes)))
        columns += [*_norms(totals, priority=2), size]
    else:
        with_any = [sum(bool(m["intruders"]) for m in tree["matrices"]) for tree in trees.values()]
        intruders = [x["intruders"] for x in totals]
        certified = [x["certified"] for x in totals]
        about = "leading directions that resemble none of the base's"
        columns += [
            _summed("with any", with_any, "matrices with intruders", 3),
            _summed("intruders", intruders, about, 5),
            _summed("certified", certified, "matrices in which every decision is proven", 4),
        ]
    return screen.join(table(columns, screen), ["--all shows each adapter's matrices"])


def _summed(head: str, numbers: Sequence[int], about: str, priority: int) -> Column:
    return Column(head, [str(n) for n in numbers], about, priority, foot=str(sum(numbers)))


def _norms(rows: Sequence[Mapping[str, Any]], priority: int) -> list[Column]:
    """Make the columns of a delta's norm before and after mitigation."""
    before = [f"{row['delta_norm']:#.4g}" for row in rows]
    after = [f"{row['delta_norm_after']:#.4g}" for row in rows]
    return [
        Column("|delta|", before, "Frobenius norm of the delta", priority),
        Column("after", after, "Frobenius norm of the written delta", priority + 2),
    ]


def _of_4_bits(tree: Mapping[str, Any]) -> list[str]:
    """Say what it means that an adapter's config names a base in 4 bits, if the base given here is in 16 or 32."""
    name = tree["adapter"].get("base_model_name_or_path") or ""
    is_plain = {m["dtype"] for m in tree["matrices"]} <= {"BF16", "F16", "F32"}
    if not is_plain or not re.search(r"4-?bit|nf4|int4|awq|gptq", name, re.IGNORECASE):
        return []
    return [
        f"trained on weights in 4 bits ({name}); on plain weights its loss is much the same (docs/recipes.md)"
    ]


def inspect_table(tree: Mapping[str, Any], screen: Screen = NO_LIMIT) -> str:
    """Format a plan: one line for each matrix, or if there are many, for each group whose names differ only in numbers."""
    totals = tree["totals"]
    matrices = sorted(tree["matrices"], key=lambda m: views.natural(m["tensor"]))
    grouped = len(matrices) > MANY and not screen.every
    groups = defaultdict[tuple[str, ...], list[dict[str, Any]]](list)
    for m in matrices:
        name = re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", m["tensor"]) if grouped else m["tensor"]
        alike = ("shape", "transposed", "dtype", "rank", "scale", "matched")
        groups[(name, *(str(m[key]) for key in alike))].append(m)
    rows = [(name, same) for (name, *_), same in groups.items()]
    hidden = rows[4 * SHOWN :] if grouped else []
    shown_rows = rows[: len(rows) - len(hidden)]
    lines = [
        f"{totals['matrices']} matrices of {totals['tensors']} tensors; base {format_size(totals['base_bytes'])}, "
        f"adapted {format_size(totals['adapted_bytes'])}; "
        f"largest matrix {totals['largest_matrix']} ({format_size(totals['largest_matrix_bytes'])})",
        *_of_4_bits(tree),
        *(f"{n['modules']} matched by {n['rule']}: {n['why']}" for n in tree["names"]),
    ]
    omitted = sum(len(same) for _, same in hidden)
    note = f"{omitted} matrices of {len(hidden)} more kinds are not shown; " if omitted else ""
    note = f"{note}--all shows each matrix" if grouped else ""
    refused = [f"{command} is refused: {why}" for command, why in tree["refused"].items()]
    planned = table(_planned_columns(shown_rows, grouped), screen)
    return screen.join(planned, [note], _carried(tree["carried"], screen), lines, refused)


def _planned_columns(rows: Sequence[tuple[str, list[Any]]], grouped: bool) -> list[Column]:
    """Make the columns of a plan, given the name and the matrices of each row."""
    first = [same[0] for _, same in rows]
    names = [name for name, _ in rows]
    about = "* stands for any number" if grouped else ""
    columns = [Column("base tensor", names, about, left=True, names=True)]
    if grouped:
        columns.append(Column("matrices", [str(len(same)) for _, same in rows], priority=9))
    else:
        modules = [m["module"] for m in first]
        about = "its name in the adapter"
        columns.append(Column("module", modules, about, priority=1, left=True, names=True))
    ranks = [str(m["rank"] or "-") for m in first]
    scales = [f"{m['scale']:.4g}" for m in first]
    rules = [m["matched"] for m in first]
    columns += [
        Column("out x in", ["x".join(map(str, m["shape"])) for m in first], priority=6),
        Column("dtype", [m["dtype"] for m in first], priority=5),
        Column("r", ranks, "rank of the adapter's factors", priority=7),
        Column("scale", scales, "factor of B A, from the adapter's alpha and rank", priority=3),
        Column(
            "matched", rules, "the rule that found its module in the base; see below", priority=4
        ),
    ]
    if any(m["transposed"] for m in first):
        stored = ["in x out" if m["transposed"] else "out x in" for m in first]
        columns.append(
            Column("stored", stored, "the order of its sides in the base's file", priority=2)
        )
    return columns


def _carried(carried: Sequence[Mapping[str, str]], screen: Screen) -> str:
    """Format the tensors of an adapter that are no factors, if it has any."""
    if not carried:
        return ""
    tensors = sorted(carried, key=lambda c: views.natural(c["tensor"]))
    if len(carried) > MANY and not screen.every:
        tensors = tensors[:SHOWN]
    names = [c["tensor"] for c in tensors]
    sources = [c["by"] for c in tensors]
    columns = [
        Column("carried along", names, "tensors that are not factors", left=True, names=True),
        Column("change", [c["change"] for c in tensors], priority=2, left=True),
        Column("by", sources, "the adapter's tensor", priority=1, left=True, names=True),
    ]
    return screen.join(table(columns, screen), [_cut(len(carried) - len(tensors), len(carried))])


def _most(items: Sequence[Any], weight: Any, screen: Screen) -> tuple[list[Any], int]:
    """Choose the items to show and count the others: all in order, or those with the largest weight, largest first."""
    if screen.every or len(items) <= MANY:
        return list(items), 0
    return sorted(items, key=weight, reverse=True)[:SHOWN], len(items) - SHOWN


def _cut(count: int, total: int, by: str = "") -> str:
    """State how many rows a table leaves out."""
    which = f"with the {by}, of {total} matrices" if by else f"first ones of {total}"
    return f"the {total - count} {which}; --all shows every one" if count else ""


def evaluation_table(
    evaluation: Evaluation, names: views.ShellWords, screen: Screen = NO_LIMIT, written: str = ""
) -> str:
    """Format the verdict, every variant's figures, the reasons, and the commands to run next.

    Parameters
    ----------
    written
        Line that says where the evaluation was written, or "".
    """
    suggestion = evaluation.best()
    lines = [
        *views.reasons(evaluation, suggestion),
        written,
        *views.commands(evaluation, suggestion, names),
    ]
    figures = table(views.figures(evaluation), screen)
    samples = sample_lines(evaluation.facts["texts"]["task"].get("samples", ()))
    return screen.join([views.verdict(evaluation, suggestion)], figures, samples, lines)


SHOWN_CHARACTERS = 200
"""Most characters that are shown of a text that an adapter wrote."""


def sample_lines(samples: Iterable[str]) -> list[str]:
    """Show the beginnings of texts that the adapter wrote."""
    return [f"the adapter wrote: {textwrap.shorten(text, SHOWN_CHARACTERS)}" for text in samples]


def map_text(record: Mapping[str, Any], base: str, screen: Screen) -> str:
    """Describe what was mapped, on which text, and the command that uses it.

    Parameters
    ----------
    base
        The base as given.
    """
    texts = listed(
        f"{text['name']} ({counted(text['tokens'], 'token')})" for text in record["texts"]
    )
    inputs = counted(record["inputs"], "input")
    matrices = counted(record["matrices"], "matrix")
    file = shlex.quote(record["output"])
    lines = [
        f"{counted(record['vectors'], 'leading vector')} of {inputs} of {matrices}, on {texts}",
        f"next, for any adapter of this base: streamer mitigate {shlex.quote(base)} ADAPTER -o OUTPUT --map {file}",
        state_line(Path(record["output"]), record["state"]),
    ]
    return screen.join(lines)


def repair_table(
    record: RepairRecord, written: Mapping[str, Any], inputs: tuple[str, str], screen: Screen
) -> str:
    """Format the measured models, the choice, and the command that measures the output, unless it is the unchanged adapter.

    Parameters
    ----------
    inputs
        Base and adapter, as given.
    """
    base, given = inputs
    adapter = record.get("lora", given)
    output = record["output"]
    samples = record.get("samples", ())
    reliable = record["reliable"]
    shown_shares = {"loss left": reliable["forgetting"]}
    if not samples:  # the others have no meaning on what the adapter wrote
        shown_shares = {
            "kept": reliable["kept"],
            "top-1 kept": reliable["top1_kept"],
        } | shown_shares
    why = "the adapter's change is too small to measure on this text; more text may help"
    lines = [
        f"writes {record['why']}",
        *sample_lines(samples),
        *(
            f"{share} is not shown: {why}"
            for share, is_shown in shown_shares.items()
            if not is_shown
        ),
        *views.record_lines(written, state_line(output, record["state"])),
    ]
    if "lora" in record:
        lines.append(
            f"converted first: {adapter} is {given} as a LoRA adapter, and was repaired in its place"
        )
    lines.append(
        f"a page with these figures: streamer report {shlex.join([output, '-o', output + '.html'])}"
    )
    if record["chosen"] != "adapter":
        texts = "" if "own_text" in record else " --task TEXT"
        variant = ["--method", "shrink", "--lambda", str(written["lambda"])]
        if record["chosen"] == "repair":
            variant = ["--coefficients", record["fit"]]
        options = shlex.join([*variant, *views.input_options(written)])
        evaluate = f"evaluate {shlex.join([base, adapter])} --general TEXT{texts} -o FILE {options}"
        lines.append(f"next, on text that nothing was trained or fitted on: streamer {evaluate}")
    return screen.join(table(views.repair_columns(record), screen), lines)


def report_text(report: Report, where: str, screen: Screen) -> str:
    """Format a report's subject, and state what was written or what to do next."""
    subject = report.subject
    page = next_lines = ""
    if (written := report.written) is not None:
        line = f"{state_line(report.output, written.state)}: {format_size(written.nbytes)}"
        page = fit(line, screen.width)
    if isinstance(subject, views.Findings):
        text = findings_table(subject, screen)
        next_lines = next_step(subject, screen)
    elif isinstance(subject, views.Evaluation):
        text = evaluation_table(subject, views.ShellWords(output=shlex.quote(where)), screen)
    else:
        text = record_table({**subject, "state": "read"}, where, screen)
    return screen.join(text, page, next_lines)


def result(outcome: Any, args: argparse.Namespace, monitor: Monitor) -> Result:
    """Return what the command's request returned."""
    # A page explains its figures, so that the table needs no legend.
    is_on_page = args.command == "report" and args.output is not None
    on = screen(args.all, args.legend and not is_on_page)
    if getattr(args, "dry_run", False):
        return outcome, dry_run_text(outcome, args.command, on)
    output = getattr(args, "output", None) or ""
    state = monitor.outputs.get(Path(output), "")
    match args.command:
        case "inspect":
            return outcome, inspect_table(outcome, on)
        case "detect":
            return _detected(outcome, args, on, monitor)
        case "mitigate" | "merge":
            return _each(outcome, _written, output, on)
        case "report":
            return outcome.record(), report_text(outcome, args.findings, on)
        case "evaluate":
            tree = {**outcome.to_dict(), "output": output, "state": state}
            written = state_line(output, state) if output else ""
            return tree, evaluation_table(outcome, _names(args), on, written)
        case "map":
            tree = {**views.map_record(outcome, output, state)}
            return tree, map_text(tree, shown(args.base[0]), on)
        case _:
            inputs = shown(args.base), shown(args.adapter)
            return outcome.record, repair_table(outcome.record, outcome.written, inputs, on)


def _written(tree: Any, on: Screen) -> Result:
    return {**tree}, record_table(tree, tree["output"], on)


def _detected(outcome: Any, args: argparse.Namespace, on: Screen, monitor: Monitor) -> Result:
    def result(findings: Any, on: Screen) -> Result:
        path = Path(findings.name)
        state = monitor.outputs[path]
        tree = {**findings.record(), "output": str(path), "state": state}
        return tree, findings_table(findings, on, path, state)

    tree, text = _each(outcome, result, args.output, on)
    adapter = shown(args.adapter[0])
    if isinstance(outcome, views.ByName):
        *_, outcome = outcome.values()
        adapter = "ADAPTER"
    return tree, f"{text}\n\n{next_step(outcome, on, shown(args.base), adapter)}"


def _names(args: argparse.Namespace) -> views.ShellWords:
    """Return the words of the commands to run after an evaluation."""
    files = (args.general, args.task, args.output, args.findings, args.coefficients, args.map)
    quoted_files = (shlex.quote(file) if file else "" for file in files)
    reading = ""
    for name in ("sequences", "length"):
        if (value := getattr(args, name)) != getattr(EvaluateOptions, name):
            reading += f" --{name} {value}"
    others = "".join(f" --other {shlex.quote(file)}" for file in args.other)
    names = views.ShellWords(shlex.join(map(shown, (args.base, args.adapter))), *quoted_files)
    return replace(
        names, reading=reading, others=others, mitigated=views.is_mitigated(args.adapter)
    )


def _each(outcome: Any, result: Callable[[Any, Screen], Result], output: str, on: Screen) -> Result:
    """Combine results for several adapters by name, in full with `--all`; return a single adapter's result unchanged."""
    if not isinstance(outcome, views.ByName):
        return result(outcome, on)
    trees = {}
    texts = []
    each = on
    for name, part in outcome.items():
        trees[name], text = result(part, each)
        texts.append(f"{name}\n{text}")
        each = replace(on, legend=False)  # one legend is enough
    if on.every:
        return views.several(trees), "\n\n".join(texts)
    present = all(tree["state"] == "present" for tree in trees.values())
    line = state_line(output, "present" if present else "written")
    return views.several(trees), f"{adapters_table(trees, on)}\n\n{line}"
