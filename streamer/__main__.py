"""The command line: the only place that prints, draws progress, and exits. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streamer import __version__
from streamer.errors import StreamerError, UsageError
from streamer.events import Event, Monitor

if TYPE_CHECKING:
    from streamer.findings import Findings
    from streamer.intruders import DetectionOptions, MitigationOptions

EXIT_CODES = """\
exit codes:
  0 done    1 unexpected    2 usage    3 bad or inconsistent input    4 output exists or does not match
  5 locked by another run    6 I/O or space (the same command resumes)    7 numeric or verification failure
  8 input changed during the run    128+N stopped by signal N (the same command resumes)
"""

EPILOG = (
    """\
a first run:
  streamer demo                                         the whole job on a generated model, in seconds
  streamer inspect BASE ADAPTER                         what would be done, matrix by matrix
  streamer detect BASE ADAPTER -o findings.safetensors  find the intruders, once
  streamer mitigate BASE ADAPTER -o DIR --lambda 0.75 --findings findings.safetensors
                                                        a mitigated adapter, for PEFT
  streamer merge BASE ADAPTER -o DIR --lambda 0.75 --findings findings.safetensors
                                                        a plain model with the mitigated adapter merged in

BASE is a model directory (or one .safetensors file), ADAPTER a PEFT LoRA directory. Results go to stdout, progress to stderr.

"""
    + EXIT_CODES
)


def _top_k(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser; options are declared here, once."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="streamer",
        description="Find the intruder dimensions of a LoRA adapter and scale them down, one matrix at a time.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"streamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    output.add_argument("--quiet", action="store_true", help="no progress, no warnings, no table")

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--io", choices=["mmap", "pread"], default="mmap",
                         help="how tensors are read; pread is for network file systems (default: mmap)")  # fmt: skip

    computing = argparse.ArgumentParser(add_help=False)
    g = computing.add_argument_group("detection")
    g.add_argument("--top-k", type=_top_k, metavar="K",
                   help="judge the K largest singular directions: a count, or a share like 0.1 (default: 10)")  # fmt: skip
    g.add_argument("--epsilon", type=float, metavar="E",
                   help="a direction whose similarity to the base is below E is an intruder (default: 0.5)")  # fmt: skip
    g.add_argument(
        "--solver",
        choices=["auto", "certified", "dense"],
        help="certified: Krylov with bounds; dense: LAPACK's full SVD; auto: the cheaper one (default: auto)",
    )
    g.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:i (default: auto)")
    g.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")

    writing = argparse.ArgumentParser(add_help=False)
    g = writing.add_argument_group("output")
    g.add_argument("--dry-run", action="store_true", help="all checks, nothing written")
    g.add_argument("--no-resume", action="store_true", help="start over instead of taking up an interrupted run")
    g.add_argument("--overwrite", action="store_true", help="replace what stands at the output")

    mitigating = argparse.ArgumentParser(add_help=False)
    g = mitigating.add_argument_group("mitigation")
    g.add_argument("--lambda", dest="mitigation_lambda", type=float, default=0.75, metavar="L",
                   help="what is left of an intruder: 1 changes nothing, 0 removes it (default: 0.75)")  # fmt: skip
    g.add_argument("--method", choices=["paper", "project", "shrink"], default="paper",
                   help="paper: scale the whole direction; project: only the adapter's part of it; "
                        "shrink: the whole adapter, no detection, the baseline (default: paper)")  # fmt: skip
    g.add_argument("--scale", choices=["all", "first"], default="all",
                   help="every intruder among the top k, or the highest-ranked one of each matrix (default: all)")  # fmt: skip
    g.add_argument("--findings", metavar="FILE", help="from `streamer detect`; without it detection runs first")

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES,
                                  formatter_class=raw, parents=[*parents, output])  # fmt: skip
        sub.set_defaults(run=globals()[f"_{name}"])
        return sub

    def inputs(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("base", metavar="BASE", help="model directory, or one .safetensors file")
        sub.add_argument("adapter", metavar="ADAPTER", help="PEFT LoRA directory")

    sub = command("inspect", "show what is there, and which tensor each module changes", reading)
    sub.add_argument("base", metavar="BASE", help="model directory, or one .safetensors file")
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="PEFT LoRA directory")
    sub = command("detect", "find the intruder dimensions and write the findings", reading, computing, writing)
    inputs(sub)
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="findings file to write")
    sub = command("mitigate", "write a mitigated adapter", reading, mitigating, computing, writing)
    inputs(sub)
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="adapter directory to write")
    sub = command(
        "merge", "write the base with the mitigated adapter merged in", reading, mitigating, computing, writing
    )
    inputs(sub)
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="model directory to write")
    sub = command("report", "show findings as a table or as JSON")
    sub.add_argument("findings", metavar="FINDINGS", help="file written by `streamer detect`")
    sub = command("demo", "run the whole job on a small generated model with planted intruders")
    sub.add_argument("--lambda", dest="mitigation_lambda", type=float, default=0.25, metavar="L",
                     help="what is left of an intruder (default: 0.25)")  # fmt: skip
    sub.add_argument("--keep", metavar="DIR", help="write everything to DIR, which must not exist, and keep it")
    return parser


def _inspect(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer import report
    from streamer.plan import make_plan
    from streamer.storage.checkpoint import open_checkpoint

    if args.adapter is not None:
        plan = make_plan(args.base, args.adapter, args.io)
        _warn(plan.base.warnings, monitor)
        tree = report.inspect_json(plan)
        _print(args, tree, report.inspect_table(tree))
        return
    base = open_checkpoint(args.base, args.io)
    _warn(base.warnings, monitor)
    files = [(name, [(t.dtype, t.nbytes) for t in f.header.tensors]) for name, f in base.files.items()]
    tree = {"schema": "streamer.plan/1", "base": base.identity(), "warnings": list(base.warnings),
            "totals": {"tensors": len(base.weight_map), "base_bytes": base.data_bytes}}  # fmt: skip
    _print(args, tree, report.dtype_table(files))


def _detect(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer.api import detect_intruder_dimensions
    from streamer.pipeline import choose_device, inspect_detection
    from streamer.plan import make_plan
    from streamer.report import findings_json, findings_table

    options = _detection_options(args, None)
    if args.dry_run:
        choose_device(args.device)
        plan = make_plan(args.base, args.adapter, args.io)
        state = inspect_detection(plan, Path(args.output), options, args.overwrite, not args.no_resume)
        _print_dry_run(args, state, len(plan.targets), 1, None)
        return
    findings = detect_intruder_dimensions(
        args.base, args.adapter, args.output, top_k=options.top_k, threshold_epsilon=options.threshold_epsilon,
        solver=options.solver, device=args.device, io=args.io, resume=not args.no_resume, overwrite=args.overwrite,
        monitor=monitor,
    )  # fmt: skip
    _print(args, findings_json(findings), findings_table(findings))


def _mitigate(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer.api import reduce_intruder_dimension
    from streamer.apply import AdapterSink

    _apply(args, monitor, AdapterSink, reduce_intruder_dimension)


def _merge(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer.api import merge_with_reduced_intruder_dimensions
    from streamer.apply import ModelSink

    _apply(args, monitor, ModelSink, merge_with_reduced_intruder_dimensions)


def _apply(args: argparse.Namespace, monitor: Monitor, sink: Any, write: Any) -> None:
    from streamer.api import prepare
    from streamer.apply import inspect_job
    from streamer.findings import load_findings
    from streamer.report import record_table

    findings = load_findings(args.findings) if args.findings else None
    detection = _detection_options(args, findings)
    mitigation = _mitigation_options(args)
    if args.dry_run:
        job = prepare(args.base, args.adapter, mitigation, detection, findings, args.device, args.io)
        planned = sink(job, Path(args.output))
        state = inspect_job(planned, args.overwrite, not args.no_resume)
        _print_dry_run(args, state, len(job.plan.targets), len(planned.output.files), planned.output.total_bytes)
        return
    record = write(
        args.base, args.adapter, args.output, findings=findings, top_k=detection.top_k,
        threshold_epsilon=detection.threshold_epsilon, mitigation_lambda=mitigation.mitigation_lambda, method=mitigation.method,
        scale=mitigation.scale, solver=detection.solver, device=args.device, io=args.io, resume=not args.no_resume,
        overwrite=args.overwrite, monitor=monitor,
    )  # fmt: skip
    _print(args, {**record, "output": args.output}, record_table(record, args.output))


def _report(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer.findings import load_findings
    from streamer.report import findings_json, findings_table

    findings = load_findings(args.findings)
    _print(args, findings_json(findings), findings_table(findings))


def _demo(args: argparse.Namespace, monitor: Monitor) -> None:
    from streamer.demo import demo_table, run_demo

    if args.keep:
        if os.path.lexists(args.keep):
            raise UsageError(f"--keep: {args.keep} exists; name a directory that does not")
        result = run_demo(Path(args.keep), args.mitigation_lambda, monitor)
    else:
        with tempfile.TemporaryDirectory(prefix="streamer-demo-") as directory:
            result = run_demo(Path(directory), args.mitigation_lambda, monitor)
    _print(args, result, demo_table(result))


def _detection_options(args: argparse.Namespace, findings: Findings | None) -> DetectionOptions:
    """The options as given; what was not given is the findings', or the default."""
    from streamer.intruders import DetectionOptions

    default = findings.options if findings is not None else DetectionOptions()
    return DetectionOptions(
        top_k=default.top_k if args.top_k is None else args.top_k,
        threshold_epsilon=default.threshold_epsilon if args.epsilon is None else args.epsilon,
        solver=default.solver if args.solver is None else args.solver,
    )


def _mitigation_options(args: argparse.Namespace) -> MitigationOptions:
    from streamer.intruders import MitigationOptions

    return MitigationOptions(args.mitigation_lambda, args.method, args.scale)


def _print_dry_run(args: argparse.Namespace, state: str, matrices: int, files: int, nbytes: int | None) -> None:
    from streamer.report import size

    says = {"new": "would write", "resume": "would resume", "done": "nothing to do: already stands"}[state]
    text = f"dry run: {says} {args.output}: {files} files" + (f", {size(nbytes)}" if nbytes is not None else "")
    tree = {"schema": "streamer.dry-run/1", "command": args.command, "output": args.output, "state": state,
            "matrices": matrices, "files": files, "bytes": nbytes}  # fmt: skip
    _print(args, tree, f"{text}; {matrices} matrices")


def _print(args: argparse.Namespace, tree: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(tree, indent=1))
    elif not args.quiet:
        print(text)


def _warn(warnings: tuple[str, ...], monitor: Monitor) -> None:
    for warning in warnings:
        monitor.emit(Event("warning", warning))


class Progress:
    """Draws events on stderr: bars on a terminal only, warnings always, nothing if quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if self._quiet:
            return
        if event.stage == "warning":
            print(f"streamer: warning: {event.name}", file=sys.stderr)
            return
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if self._bar is None or event.stage != self._stage or event.total != self._bar.total:
            self.close()
            self._stage = event.stage
            self._bar = tqdm(total=event.total, initial=event.done, desc=event.stage, file=sys.stderr, leave=False,
                             bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining} {postfix}")  # fmt: skip
        self._bar.set_postfix_str(event.name, refresh=False)
        self._bar.update(event.done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def _signals(monitor: Monitor) -> Iterator[None]:
    """SIGINT and SIGTERM: the first asks for a stop at the next safe point, the second ends the process at once.

    A thread waits for them, since Python runs handlers in the main thread alone, which may sit in LAPACK for a minute.
    """
    watched = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def watch() -> None:
        first = signal.sigwait(watched)
        monitor.request_stop(first)
        print(
            f"streamer: signal {int(first)}: stopping at the next safe point; once more to stop at once",
            file=sys.stderr,
        )
        os._exit(128 + signal.sigwait(watched))

    threading.Thread(target=watch, daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = build_parser().parse_args(argv)
    progress = Progress(args.quiet)
    monitor = Monitor(progress)
    try:
        with _signals(monitor):
            try:
                if getattr(args, "threads", None) is not None:
                    _set_threads(args.threads)
                args.run(args, monitor)
            finally:
                progress.close()
        sys.stdout.flush()
    except StreamerError as e:
        print(f"streamer: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone; that is no fault
        return 0
    except OSError as e:
        print(
            f"streamer: {e.filename or 'I/O'}: {e.strerror or e}; the same command resumes once the cause is gone",
            file=sys.stderr,
        )
        return 6
    except MemoryError:
        print(
            "streamer: out of memory; use fewer threads or a machine with more, then run the same command again",
            file=sys.stderr,
        )
        return 1
    return 0


def _set_threads(n: int) -> None:
    if n < 1:
        raise UsageError(f"--threads: expected a number from 1, found {n}")
    import torch

    torch.set_num_threads(n)


def main() -> NoReturn:
    """Entry point of the `streamer` command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
