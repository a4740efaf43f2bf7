"""Define the types that keys of printed and written records share, with their JSON Schema and their meaning.

A record is a `TypedDict`, or a dataclass that `dataclasses.asdict` prints. In `Annotated`, a text is the key's description, `Keywords` are
keywords of JSON Schema, and a dataclass describes a ``dict[str, Any]`` made from it. A key ``x`` of a `Mean` or a `Difference` has a key
``x_se`` beside it, its standard error (`statistics.flat`). From these, ``tools/make_schemas.py`` generates
``streamer/schemas`` and the tables in ``docs/formats.md``.

Name which of a matrix's intruders are scaled.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from streamer.events import OutputState


class Keywords:
    """Hold keywords of JSON Schema."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


class Estimated:
    """Describe the key ``x_se`` beside a key ``x``."""

    def __init__(self, error: str) -> None:
        self.error = error


# fmt: off
Count = Annotated[int, Keywords(minimum=0)]
Amount = Annotated[float, Keywords(minimum=0)]
Share = Annotated[float, Keywords(minimum=0, maximum=1)]
KeptShare = Annotated[float, Keywords(exclusiveMinimum=0, maximum=1)]
Sha256 = Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
Mean = Annotated[float, Estimated("Its standard error over sequences.")]
Difference = Annotated[float, Estimated("Its standard error, paired by sequence.")]
TensorName = Annotated[str, "Name of the tensor in the base; a following [N] means matrix N of a stack of experts."]
ModuleName = Annotated[str, "Name of the module in the adapter."]
Version = Annotated[str, "Version of streamer that made it."]
OutputPath = Annotated[str, "Path of the output, as given; with several adapters, the given directory and the adapter's name in it."]
State = Annotated[OutputState, "What this run did: wrote the output, finished an interrupted run, or found it finished and set its files' "
    "times to now."]

class ReportFile(TypedDict):
    """A file of a report."""
    file: Annotated[str, "Its name."]
    bytes: Annotated[Count, "Its size in bytes."]


Selection = Literal["all", "first"]
"""The intruders of a matrix that are scaled: all, or the highest-ranked one."""
