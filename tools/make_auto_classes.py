"""Write streamer/auto_classes.json: which class transformers has for a model type and a task, taken from the installed transformers.

python tools/make_auto_classes.py            # rewrites the file
python tools/make_auto_classes.py --check    # exit code 1 if the file is not what the installed version says
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "streamer" / "auto_classes.json"

# PEFT's task types, and the auto class by which transformers loads a model for each.
TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FEATURE_EXTRACTION": "MODEL",
}


def make_table() -> dict[str, Any]:
    """The table of the installed transformers."""
    import transformers
    from transformers.models.auto import modeling_auto

    def classes(task: str) -> dict[str, str]:
        names = getattr(modeling_auto, f"{TASKS[task]}_MAPPING_NAMES")
        return {t: c if isinstance(c, str) else c[0] for t, c in names.items()}

    heads = {task: classes(task) for task in TASKS if task != "FEATURE_EXTRACTION"}
    known = {t for found in heads.values() for t in found}
    bare = {t: c for t, c in classes("FEATURE_EXTRACTION").items() if t in known}
    names = {t: c.removesuffix("Model") for t, c in sorted(bare.items())}
    tasks: dict[str, dict[str, list[str]]] = {}
    for task, found in (heads | {"FEATURE_EXTRACTION": bare}).items():
        by_form: dict[str, list[str]] = {}
        for model_type, cls in sorted(found.items()):
            name = names.get(model_type)
            regular = name is not None and cls.startswith(name)
            by_form.setdefault(f"*{cls.removeprefix(name or '')}" if regular else cls, []).append(model_type)
        tasks[task] = dict(sorted(by_form.items()))
    return {"source": f"transformers {transformers.__version__} (Apache-2.0), modeling_auto", "names": names,
            "tasks": tasks}  # fmt: skip


def as_text(table: dict[str, Any]) -> str:
    """One line a name or form, so that a new version shows as a readable difference."""
    names = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table["names"].items())
    lines = ["{", f'"source": {json.dumps(table["source"])},', f'"names": {{\n{names}\n}},', '"tasks": {']
    for n, (task, forms) in enumerate(table["tasks"].items()):
        body = ",\n".join(f"  {json.dumps(form)}: {json.dumps(types)}" for form, types in forms.items())
        lines.append(f" {json.dumps(task)}: {{\n{body}\n }}" + ("," if n + 1 < len(table["tasks"]) else ""))
    return "\n".join([*lines, "}", "}", ""])


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    text = as_text(make_table())
    if args.check:
        return int(TABLE.read_text() != text)
    TABLE.write_text(text)
    print(f"wrote {TABLE}: {len(text)} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
