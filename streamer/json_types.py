"""Name the types that keys of printed and written records share: what JSON Schema says of them, and what they mean.

A record is a `TypedDict`, or a dataclass that `dataclasses.asdict` prints. In `Annotated`, a text is the key's description, `Keywords` are
those of JSON Schema, and a dataclass stands for a ``dict[str, Any]`` that is made from it. ``tools/make_schemas.py`` makes
``streamer/schemas`` and the tables of ``docs/formats.md`` of them.
"""

from typing import Annotated, Any, TypedDict

from streamer.events import OutputState


class Keywords:
    """Hold keywords of JSON Schema."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


# fmt: off
Count = Annotated[int, Keywords(minimum=0)]
Amount = Annotated[float, Keywords(minimum=0)]
Share = Annotated[float, Keywords(minimum=0, maximum=1)]
KeptShare = Annotated[float, Keywords(exclusiveMinimum=0, maximum=1)]
Sha256 = Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
StandardError = Annotated[Amount, "Its standard error over sequences."]
PairedError = Annotated[Amount, "Its standard error, paired by sequence."]
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
