"""Write streamer/plan/auto_classes.json: which class transformers has for a model type and a task, taken from the installed transformers.

python tools/make_auto_classes.py            # rewrites the file
python tools/make_auto_classes.py --check    # exit code 1 if the file is not what the installed version says
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import table_file

KEY = "tie_word_embeddings"

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
            by_form.setdefault(f"*{cls.removeprefix(name or '')}" if regular else cls, []).append(
                model_type
            )
        tasks[task] = dict(sorted(by_form.items()))
    ties = {task: _ties(heads[task], bare) for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")}
    return {
        "source": f"transformers {transformers.__version__} (Apache-2.0), modeling_auto",
        "names": names,
        "tasks": tasks,
        "ties": ties,
    }


def _ties(classes: Mapping[str, str], bare: Mapping[str, str]) -> dict[str, list[str]]:
    """The model types whose head for a task is all the embedding, where they are tied: by default, or only where a config says so."""
    import transformers

    found: dict[str, list[str]] = {"default": [], "stated": []}
    for model_type, name in sorted(classes.items()):
        # Of models that need another package, or have no config by default, nothing is known; their errors are of many kinds.
        with contextlib.suppress(Exception):
            config = transformers.CONFIG_MAPPING[model_type]()
            by_default = bool(getattr(config, KEY, False))
            setattr(config, KEY, True)
            rest = _parameters(name, config)
            prefix = getattr(transformers, name).base_model_prefix + "."
            if rest := {parameter for parameter in rest if not parameter.startswith(prefix)}:
                rest -= _parameters(bare[model_type], config)
            if not rest:
                found["default" if by_default else "stated"].append(model_type)
    return found


def _parameters(name: str, config: Any) -> set[str]:
    """Names of a model's parameters, one name of those that are tied."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, name)._from_config(config)
        model.tie_weights()  # else a part of initialization
        return {parameter for parameter, _ in model.named_parameters()}


def as_text(table: dict[str, Any]) -> str:
    """One line a name or form, so that a new version shows as a readable difference."""
    names = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table["names"].items())
    lines = [
        "{",
        f'"source": {json.dumps(table["source"])},',
        f'"names": {{\n{names}\n}},',
        '"tasks": {',
    ]
    for n, (task, forms) in enumerate(table["tasks"].items()):
        body = ",\n".join(
            f"  {json.dumps(form)}: {json.dumps(types)}" for form, types in forms.items()
        )
        lines.append(
            f" {json.dumps(task)}: {{\n{body}\n }}" + ("," if n + 1 < len(table["tasks"]) else "")
        )
    ties = ",\n".join(
        f" {json.dumps(task)}: {json.dumps(types)}" for task, types in table["ties"].items()
    )
    return "\n".join([*lines, "},", f'"ties": {{\n{ties}\n}}', "}", ""])


if __name__ == "__main__":
    sys.exit(table_file.main(__doc__ or "", "auto_classes.json", lambda: as_text(make_table())))
