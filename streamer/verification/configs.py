"""Compare an output's config with the inputs', except for deliberate changes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.verification.formulas import CONFIG_NAME, AdapterFiles
from streamer.verification.inventory import Part, parts
from streamer.verification.result import Outcome
from streamer.verification.side_files import MODEL_CONFIG
from streamer.verification.tensors import TensorFiles, same_bytes

ABSENT = object()
TIE_KEY = "tie_word_embeddings"
LABEL_NAMES = ("id2label", "label2id")
LABELS = (*LABEL_NAMES, "num_labels", "_num_labels", "problem_type")
QUANTIZATION = ("quantization_config", "compression_config")

CLASSES = {
    "SEQ_CLS": r"\w+ForSequenceClassification", "TOKEN_CLS": r"\w+ForTokenClassification", "FEATURE_EXTRACTION": r"\w+",
    "QUESTION_ANS": r"\w+ForQuestionAnswering(Simple)?", "SEQ_2_SEQ_LM": r"\w+(ForConditionalGeneration|ForTextToText|Model)",
    "CAUSAL_LM": r"\w+(ForCausalLM|LMHeadModel|ModelWithLMHead|ForConditionalGeneration|Decoder)",
}  # fmt: skip
"""Pattern for a merged model's class by the adapter's task, for a base with another head or none."""

KEPT = (
    "base_model_name_or_path",
    "modules_to_save",
    "peft_version",
    "revision",
    "task_type",
    "trainable_token_indices",
)
"""Keys that an adapter's config keeps when it is rewritten as LoRA of another rank; all others describe the old factors."""

READ_ONLY = ("lora_B_layout", "unsloth_fused_expert_lora")
"""Keys that describe how an input is stored; outputs do not have them."""


@dataclass(frozen=True)
class ModelConfigCheck:
    """Compare a merged model's ``config.json`` with the base's or the fine-tuned model's.

    Attributes
    ----------
    outcome
        Collects the differences.
    record
        The output's ``streamer.json``.
    source
        Directory of the model from which the output's config comes.
    adapter, base, files
        The adapter, and the tensors of the base and of the output.
    carried
        The model's tensor → the adapter's tensors that edit it.
    """

    outcome: Outcome
    record: dict[str, Any]
    source: Path
    adapter: AdapterFiles
    base: TensorFiles
    files: TensorFiles
    carried: dict[str, list[Part]]

    def check(self) -> None:
        """Note each key that differs, unless a change of the tensors explains it."""
        path = self.outcome.output / MODEL_CONFIG
        before, after = _tree(self.source / MODEL_CONFIG), _tree(path)
        for keys, was, now in _changes(before, after, LABEL_NAMES):
            if not self._is_explained(keys, was, now):
                self.outcome.differ(path, f"{'.'.join(keys)} {_shown(was)}, as the inputs say", _shown(now))
        untied = any(part.role == "tied" for edits in self.carried.values() for part in edits)
        # Matrices that are equal in the base and differ in the output.
        if not self.adapter.is_model and any(
            keys[-1] == TIE_KEY and value is True for keys, _, value in _changes({}, before)
        ):
            untied |= any(
                {one, other} <= self.base.all_names
                and same_bytes(self.base, one, self.base, other)
                and not same_bytes(self.files, one, self.files, other)
                for one, other in self._pairs()
            )
        if untied and not any(keys[-1] == TIE_KEY and now is False for keys, _, now in _changes({}, after)):
            self.outcome.differ(path, f"{TIE_KEY} false, since the output has a head of its own", "another value")

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Yield each changed matrix outside of layers with every other one of its shape, such as a head and its embedding."""
        outer = [name for name in self.files.all_names if not re.search(r"\.\d+\.", name)]
        changed = {*self.carried, *(row["tensor"] for row in self.record["matrices"])}
        shapes = {name: self.files.stored(name).shape for name in outer}
        for one in (name for name in outer if name in changed and len(shapes[name]) == 2):
            yield from ((one, other) for other in outer if other != one and shapes[other] == shapes[one])

    def _is_explained(self, keys: tuple[str, ...], was: Any, now: Any) -> bool:
        key, shapes = keys[-1], {name: self.files.stored(name).shape for name in self.carried if name in self.files}
        if self.adapter.is_model:
            return False
        if key == TIE_KEY:
            return now is False and any(self._pairs())
        if "vocab" in key:
            return now in {
                shape[0] for n, shape in shapes.items() if n in self.base and shape != self.base.stored(n).shape
            }
        if key in LABEL_NAMES:
            names = {str(i): f"LABEL_{i}" for i in range(len(now) if isinstance(now, dict) else 0)}
            heads = {shape[0] for shape in shapes.values() if shape}
            return len(names) in heads and now == (
                names if key == "id2label" else {v: int(k) for k, v in names.items()}
            )
        if key in LABELS:
            return now is ABSENT
        if key == "architectures" and isinstance(now, list) and len(now) == 1:
            old = was[0] if isinstance(was, list) and was else now[0]
            wanted = CLASSES.get(str(self.adapter.config.get("task_type")), "(?!)")
            return re.fullmatch(wanted, str(now[0])) is not None and str(now[0])[:3].lower() == str(old)[:3].lower()
        return key in QUANTIZATION and now is ABSENT and bool(self.record["dequantize"])


def check_adapter_config(record: dict[str, Any], adapter: AdapterFiles, files: AdapterFiles, outcome: Outcome) -> None:
    """Compare a written adapter's config with the input's, or with what its own tensors and the rank of ``--to-lora`` imply."""
    path, after = outcome.output / CONFIG_NAME, files.config
    before = {"peft_type": "LORA"} | {key: value for key, value in adapter.config.items() if key not in READ_ONLY}
    if record["to_lora"] is not None:
        before, lists = _of_lora(record, adapter, files), ("target_modules", "modules_to_save")
        before, after = ({k: sorted(v) if k in lists and v else v for k, v in tree.items()} for tree in (before, after))
    for keys, was, now in _changes(before, after):
        outcome.differ(path, f"{'.'.join(keys)} {_shown(was)}, as the inputs say", _shown(now))


def _of_lora(record: dict[str, Any], adapter: AdapterFiles, files: AdapterFiles) -> dict[str, Any]:
    """Make the config of an adapter of rank `to_lora`, or of the ranks that its tensors have by module."""
    found = list(parts(files))
    config = {key: adapter.config[key] for key in KEPT if key in adapter.config}
    saved = {
        part.target.rpartition(".")[0] for part in found if part.role == "saved" and ".base_layer." not in part.source
    }
    if adapter.is_model and saved:
        config["modules_to_save"] = [*saved]
    if adapter.is_model and "ensure_weight_tying" in files.config:
        config["ensure_weight_tying"] = True
    # PEFT's names of a fine-tuned model's modules may have another prefix than the record's.
    linear = {_last(part.target) for part in found if ".lora_A." in part.source}
    inward = any(row["transposed"] and _last(row["module"]) in linear for row in record["matrices"])
    ranks = {module: files.files.stored(names[role])[1][0] for module, names in files.modules.items()
             for role in ("lora_A", "lora_embedding_A") if role in names}  # fmt: skip
    asked, trained = record["to_lora"], adapter.is_model or adapter.config.get("bias", "none") != "none"
    largest = asked if isinstance(asked, int) else max(ranks.values(), default=1)
    if others := {module: rank for module, rank in ranks.items() if rank != largest}:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    return config | {
        "peft_type": "LORA", "fan_in_fan_out": inward, "r": largest, "lora_alpha": largest,
        "target_modules": [*{part.target for part in found if part.role == "factor"}],
        "bias": "all" if trained and any(part.source.endswith(".bias") for part in found) else "none",
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _tree(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _changes(
    before: Any, after: Any, whole: tuple[str, ...] = (), at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the path of each key whose value differs, with both values; objects under keys in `whole` are compared whole."""
    if isinstance(after, dict) and (isinstance(before, dict) or before is ABSENT) and (not at or at[-1] not in whole):
        was: dict[str, Any] = before if isinstance(before, dict) else {}
        for key in [*was, *(key for key in after if key not in was)]:
            yield from _changes(was.get(key, ABSENT), after.get(key, ABSENT), whole, (*at, key))
    elif before is ABSENT or after is ABSENT or json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
        yield at, before, after


def _shown(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
