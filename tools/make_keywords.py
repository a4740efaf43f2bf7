"""Write the types of the library's keywords, ``streamer/api/keywords.pyi``, from the declared options, for type checkers.

python tools/make_keywords.py            write the file
python tools/make_keywords.py --check    compare it
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamer
from streamer import options, peft
from streamer.options import declared

FILE = Path(__file__).parents[1] / "streamer" / "api" / "keywords.pyi"

HEAD = '"""Types of the keywords that functions accept as ``**options``; ``tools/make_keywords.py`` writes them."""\n'


def functions() -> dict[str, tuple[type, Callable[..., Any]]]:
    """Map the name of each class of keywords to the class of options and a function that accepts them."""
    return {
        "DetectKeywords": (options.DetectOptions, streamer.detect_intruder_dimensions),
        "ReduceKeywords": (options.MitigateOptions, streamer.reduce_intruder_dimension),
        "MergeKeywords": (options.MergeOptions, streamer.merge_with_reduced_intruder_dimensions),
        "IterateKeywords": (options.IterateOptions, streamer.iter_merged),
        "EvaluateKeywords": (options.EvaluateOptions, streamer.evaluate_variants),
        "MapKeywords": (options.MappingOptions, streamer.map_inputs),
        "RepairKeywords": (options.RepairOptions, streamer.repair_adapter),
        "VerifyKeywords": (options.VerifyOptions, streamer.verify_output),
        "LiveDetectKeywords": (options.LiveOptions, peft.detect_intruder_dimensions),
        "LiveKeywords": (options.LiveMitigation, peft.reduce_intruder_dimension),
    }


def keywords() -> str:
    """Write the classes."""
    imports = re.search(
        r"^if TYPE_CHECKING:\n((?:    .*\n|\n)*?)\nSeveral",
        inspect.getsource(options),
        re.MULTILINE,
    )
    assert imports is not None
    lines = [
        HEAD,
        "from collections.abc import Callable, Sequence",
        "from pathlib import Path",
        *inspect.cleandoc(imports[1]).splitlines(),
        "from streamer.events import Monitor, OnEvent",
    ]
    lines = [line.replace("import Literal", "import Literal, TypedDict") for line in lines]
    for name, (kind, function) in functions().items():
        own = inspect.signature(inspect.unwrap(function)).parameters
        fields = [
            f"    {field.name}: {field.type}".replace("'", '"')
            for field, _, _ in declared(kind)
            if field.name not in own
        ]
        lines += ["", f"class {name}(TypedDict, total=False):", *fields]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the types of the library's keywords.")
    parser.add_argument(
        "--check", action="store_true", help="compare the file instead of writing it"
    )
    if parser.parse_args().check:
        sys.exit(
            0 if FILE.read_text() == keywords() else f"{FILE}: differs; run tools/make_keywords.py"
        )
    FILE.write_text(keywords())


if __name__ == "__main__":
    main()
