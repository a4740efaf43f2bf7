"""Run the commands, one after another, on the small trained model that the package carries, as a tour."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from streamer.cli.terminal import Result
from streamer.errors import MissingPackageError, OutputExistsError, StorageError
from streamer.tables import Screen, table
from streamer.units import counted

DATA = Path(__file__).parents[1] / "demo"
"""A base, an adapter, and texts as token ids; its README.md says what they are."""

FIRST = ("inspect base adapter", "detect base adapter -o findings.safetensors")
REPAIR = "repair base adapter --general general.npy --task task.npy -o repaired"
SHRINK = "mitigate base adapter --method shrink --lambda 0.75 -o shrunk"
LAST = (
    "merge base {0} --lambda 1 -o merged",
    "verify merged base {0} --sample all",
    "report {0} -o report.html",
)
"""The commands; the last ones use what the repair, or the shrink, has written."""


# fmt: off
class DemoStep(TypedDict):
    """A command."""
    command: Annotated[str, "The command line."]
    record: Annotated[Any, "What the command prints with --json; its key schema names its form."]

class DemoRecord(TypedDict):
    """What `streamer demo --json` prints."""
    schema: Literal["streamer.demo/2"]
    steps: Annotated[list[DemoStep], "The commands that ran, in a directory with the demo's files."]
    missing: Annotated[str | None, "Why the adapter was shrunk and not repaired: a package that is not installed; null if it was repaired."]
    directory: Annotated[str | None, "Directory of all files, as given with --output; null without --output, when nothing is kept."]
# fmt: on


def run_demo(output: str | None, run: Callable[[list[str]], Result]) -> DemoRecord:
    """Run the commands in a copy of the data, and keep it if there is an output.

    Parameters
    ----------
    run
        Runs a command.
    """
    target = None if output is None else Path(output).absolute()
    if target is not None:
        if os.path.lexists(target):
            raise OutputExistsError(f"{output}: exists; name a directory that does not", target)
        target.parent.mkdir(parents=True, exist_ok=True)
    steps: list[DemoStep] = []

    def step(line: str) -> None:
        record, _ = run(line.split())
        steps.append({"command": f"streamer {line}", "record": record})

    # The output gets its name at the end: a run that is interrupted leaves nothing.
    with tempfile.TemporaryDirectory(
        prefix=".streamer-demo-", dir=target and target.parent
    ) as temporary:
        directory = Path(temporary, "demo")
        try:
            shutil.copytree(DATA, directory, copy_function=shutil.copyfile)  # writable
        except shutil.Error as e:
            raise StorageError(
                f"{output or temporary}: cannot copy the demo's files: {e.args[0][0][2]}"
            ) from e
        with contextlib.chdir(directory):
            for line in FIRST:
                step(line)
            missing = None
            written = "repaired"
            try:
                step(REPAIR)
            except MissingPackageError as e:
                missing = str(e)
                written = "shrunk"
                step(SHRINK)
            for line in LAST:
                step(line.format(written))
        if target is not None:
            os.rename(directory, target)
    return {"schema": "streamer.demo/2", "steps": steps, "missing": missing, "directory": output}


ABOUT = (
    "base: a Llama of 0.9 million parameters, trained on sources of Python",
    "adapter: a LoRA, trained on Python's language reference",
)
EVALUATE = (
    "streamer evaluate base adapter --general general-test.npy --task task-test.npy --coefficients repaired.fit.safetensors "
    "-o evaluation.json"
)
NEXT = "next: streamer repair BASE ADAPTER -o OUTPUT"


def _outcome(record: Mapping[str, Any]) -> str:
    """Say in a line what a command found or wrote."""
    totals = record.get("totals", {})
    match record["schema"].partition("/")[0]:
        case "streamer.plan":
            return f"the adapter changes {counted(totals['matrices'], 'matrix')}"
        case "streamer.findings":
            return f"{counted(totals['intruders'], 'intruder')}, {totals['certified']} of {counted(totals['matrices'], 'matrix')} certified"
        case "streamer.repair":
            return str(record["why"])
        case "streamer.verification":
            return f"{counted(totals['files'], 'file')}, {counted(totals['recomputed'], 'matrix')} recomputed: nothing differs"
    return f"wrote {record['output']}"


def demo_text(result: DemoRecord, screen: Screen) -> str:
    """Show each command with its result in a line, the figures of the repair, and what to do next."""
    from streamer.api.views import repair_columns

    tour = [*ABOUT]
    figures = ""
    for step in result["steps"]:
        record = step["record"]
        tour += [f"$ {step['command']}", f"  {_outcome(record)}"]
        if record["schema"] == "streamer.repair/1":
            figures = table(repair_columns(record), screen)
    left_out = []
    if missing := result["missing"]:
        left_out = [f"repair, which forgets less for what it keeps, was left out: {missing}"]
    kept = ["with -o DIR, the demo keeps the files, and a page with these figures"]
    if (directory := result["directory"]) is not None:
        kept = [f"a page with these figures: {Path(directory, 'report.html').absolute().as_uri()}"]
        if figures:
            kept.append(
                f"on text that nothing was trained or fitted on, in {directory}: {EVALUATE}"
            )
    return screen.join(tour, left_out, figures, [*kept, NEXT])
