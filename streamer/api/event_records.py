"""Define the JSON of errors and events (``streamer.error/1``, ``streamer.event/1``), in a separate file so that ``--help`` stays fast."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from streamer.json_types import Amount, Count, Keywords


# fmt: off
class ErrorEntry(TypedDict):
    """An error."""
    kind: Annotated[str, "Name of the error's class in streamer.errors, or of Python's own class."]
    exit_code: Annotated[int, Keywords(minimum=1, maximum=255), "Exit code of the command."]
    message: Annotated[str, "Where, what was expected and found, and what to do next, in one line."]
    path: Annotated[str | None, "The file or directory that it is about; null if it is about none or several."]

class ErrorsRecord(TypedDict):
    """What any command prints with --json if it fails; the message also goes to stderr."""
    schema: Literal["streamer.error/1"]
    errors: Annotated[list[ErrorEntry], Keywords(minItems=1), "What went wrong; at present always one."]

class EventRecord(TypedDict):
    """A line that --json-events writes to stderr while a command runs; the last is `done` or `error`."""
    schema: Literal["streamer.event/1"]
    event: Annotated[Literal["progress", "warning", "note", "error", "done"], "progress: a step; warning, note: a message; error, done: "
        "the end."]
    seconds: Annotated[Amount, "Wall time in s since the command began."]
    stage: NotRequired[Annotated[Literal["download", "probe", "detect", "write", "verify", "recompute", "evaluate", "fit", "map"],
        "For progress: download (in bytes; from the hub, in files), probe (measures this machine, in steps), detect (in units of work), "
            "write and verify (in bytes), recompute (in matrices), evaluate, fit and map (in multiplications)."]]
    name: NotRequired[Annotated[str, "For progress: the matrix or file that has just begun; empty at the end of a stage."]]
    done: NotRequired[Annotated[Count, "For progress: units that are done."]]
    total: NotRequired[Annotated[Count, "For progress: total number of units."]]
    items: NotRequired[Annotated[Count, "For progress: matrices (detect, recompute), tensors and files (write), files (verify) or passes "
        "that are done."]]
    of: NotRequired[Annotated[Count, "For progress: their total number; 0 if unknown."]]
    adapter: NotRequired[Annotated[str, "For progress: name of the adapter if there are several, else empty."]]
    kind: NotRequired[Annotated[str, "For an error: name of its class in streamer.errors, or of Python's own class."]]
    exit_code: NotRequired[Annotated[int, Keywords(minimum=1, maximum=255), "For an error: exit code of the command."]]
    path: NotRequired[Annotated[str | None, "For an error: the file or directory that it is about; null if it is about none or several."]]
    message: NotRequired[Annotated[str, "The text of a warning or note; what was wrong and what to do next; or what was done."]]
