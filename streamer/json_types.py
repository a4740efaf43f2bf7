"""Types of the keys of printed and written records, with their JSON Schema and their meaning.

A record is a `TypedDict`, or a dataclass that `dataclasses.asdict` prints. The type of a key is ``Annotated[type, …]`` with one of these:

- a text: the key's description;
- `Keywords`: keywords of JSON Schema;
- a dataclass: it describes a ``dict[str, Any]`` that is made from it.

A key ``x`` of type `Mean` or `Difference` has its standard error beside it, in ``x_se`` (`statistics.flattened`). ``tools/make_schemas.py``
makes ``streamer/schemas`` from these types; `check` compares an object that was read with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin

from streamer.events import OutputState


class Keywords:
    """Hold keywords of JSON Schema."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


class Estimated:
    """Describe the key ``x_se`` beside a key ``x``."""

    def __init__(self, error: str) -> None:
        self.error = error


JsonObject = Mapping[str, Any]

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
Shape = Annotated[tuple[int, int], Keywords(minItems=2, maxItems=2),
    "Rows (outputs) and columns (inputs) of the matrix, whatever its order on disk."]
Encoding = Annotated[str, "Encoding in the base: a dtype of the safetensors format, or an encoding of quantized weights."]
Rank = Annotated[Count, "Rank of the adapter's factors for this module; 0 if it has none."]
Scale = Annotated[float, "Factor of B A, from the adapter's alpha and rank."]
Version = Annotated[str, "Version of streamer that made it."]
OutputPath = Annotated[str, "Path of the output, as given; with several adapters, the given directory and the adapter's name in it."]
State = Annotated[OutputState, "What this run did: wrote the output, finished an interrupted run, or found it finished and set its files' "
    "times to now."]

class MatrixHead(TypedDict):
    """A matrix that the adapter changes."""
    tensor: TensorName
    module: ModuleName
    shape: Shape
    dtype: Encoding
    rank: Rank
    scale: Scale

Selection = Literal["all", "first"]
"""The intruders of a matrix that are scaled: all, or the highest-ranked one."""


def check(tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Check the keys of an object from JSON against their types in a record, in which a list may be a tuple.

    Raises
    ------
    KeyError, TypeError
        If one is missing, or has another type or a number below its minimum.
    """
    for key, hint in record.items():
        if (key in tree or get_origin(hint) is not NotRequired) and not _test(hint)(tree[key]):
            raise TypeError(f"{key} is {type(tree[key]).__name__}")


@cache
def _test(hint: Any) -> Callable[[Any], bool]:
    """Make the test whether a value from JSON is of a type."""
    origin = get_origin(hint)
    args = get_args(hint)
    if origin in (Annotated, NotRequired):
        inner = _test(args[0])
        keywords = [annotation.keywords for annotation in args[1:] if isinstance(annotation, Keywords)]
        least = [keyword["minimum"] for keyword in keywords if "minimum" in keyword]
        return lambda value: inner(value) and not any(value < minimum for minimum in least)
    if origin in (Union, UnionType):
        tests = [*map(_test, args)]
        return lambda value: any(test(value) for test in tests)
    if origin in (list, tuple):
        each = _test(args[0])
        return lambda value: type(value) is list and all(map(each, value))
    kinds = (int, float) if hint is float else (origin or hint,)
    return lambda value: type(value) in kinds
