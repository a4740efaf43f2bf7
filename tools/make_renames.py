"""Write streamer/plan/renames.json: how transformers renames tensors on loading, taken from the installed transformers.

python tools/make_renames.py            # rewrites the file
python tools/make_renames.py --check    # exit code 1 if the file is not what the installed version says
"""

from __future__ import annotations

import json
import sys
from typing import Any

import table_file

# Renames that count layers anew; what they touch is loaded under a name that no pattern gives.
RENUMBERS = {
    "LayerPairCollapse": r"layers\.(\d+)\.(mixer|attn_alpha|mlp_alpha)(?=\.|$)",
    "Inkling2IndexOffsetWeightRename": None,
}


def sources(transform: Any) -> list[str]:
    """The compiled pattern of each source, the longest first, as transformers tries them."""
    pattern = transform.compiled_sources.pattern
    found = []
    ends = [pattern.index(f"(?P<g{i}>") for i in range(len(transform.source_patterns))]
    for start, i in sorted((at, i) for i, at in enumerate(ends)):
        after = min((e - 1 for e in ends if e > start), default=len(pattern))
        found.append((i, pattern[start + len(f"(?P<g{i}>") : after - 1]))
    return [p for _, p in found]


def step(transform: Any) -> dict[str, Any]:
    """One entry of the table."""
    kind = type(transform).__name__
    if kind in RENUMBERS:
        return {"convert": [RENUMBERS[kind] or sources(transform)[0]], "to": [], "by": ["renumber"]}
    if kind == "GroupWeightRename":
        order = sorted(
            range(len(transform.source_patterns)), key=lambda i: -len(transform.source_patterns[i])
        )
        by_index = dict(zip(order, sources(transform), strict=True))
        pairs = [[by_index[i], transform.target_patterns[i]] for i in range(len(order))]
        return {"group": pairs}
    operations = [
        type(op).__name__
        + "".join(
            f" {k if v is True else v}"
            for k, v in vars(op).items()
            if v is not False and isinstance(v, int)
        )
        for op in getattr(transform, "operations", [])
    ]
    if operations:
        order = sorted(
            range(len(transform.source_patterns)), key=lambda i: -len(transform.source_patterns[i])
        )
        by_index = dict(zip(order, sources(transform), strict=True))
        return {
            "convert": [by_index[i] for i in range(len(order))],
            "to": transform.target_patterns,
            "by": operations,
        }
    return {"rename": "|".join(sources(transform)), "to": transform.target_patterns[0]}


def make_table() -> dict[str, Any]:
    """The table of the installed transformers."""
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    rules: dict[str, list[dict[str, Any]]] = {}
    same: dict[str, str] = {}
    first: dict[str, str] = {}
    for key, transforms in sorted(_build_checkpoint_conversion_mapping().items()):
        steps = [step(t) for t in transforms]
        text = json.dumps(steps)
        if text in first:
            same[key] = first[text]
        else:
            first[text] = key
            rules[key] = steps
    known = rules.keys() | same.keys()
    classes = {
        t: c for t, c in sorted(MODEL_MAPPING_NAMES.items()) if isinstance(c, str) and c in known
    }
    return {
        "source": f"transformers {transformers.__version__} (Apache-2.0), conversion_mapping",
        "rules": rules,
        "same": same,
        "classes": classes,
    }


def as_text(table: dict[str, Any]) -> str:
    """One line a step, so that a new version shows as a readable difference."""
    lines = ["{", f'"source": {json.dumps(table["source"])},', '"rules": {']
    for n, (key, steps) in enumerate(table["rules"].items()):
        body = ",\n".join(f"  {json.dumps(s)}" for s in steps)
        lines.append(
            f" {json.dumps(key)}: [\n{body}\n ]" + ("," if n + 1 < len(table["rules"]) else "")
        )
    lines.append("},")
    for name in ("same", "classes"):
        pairs = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table[name].items())
        lines.append(f'"{name}": {{\n{pairs}\n}}' + ("," if name == "same" else ""))
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    sys.exit(table_file.main(__doc__ or "", "renames.json", lambda: as_text(make_table())))
