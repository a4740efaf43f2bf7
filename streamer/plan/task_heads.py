"""Update a model's config for the head that an adapter saves: the class and the number of labels.

An adapter for classification saves a head that its base does not have, or has for another number of labels. The class of the merged
model follows from the base's type and the adapter's task, by transformers' own table (``auto_classes.json``, see
``tools/make_auto_classes.py``); the number of labels is the head's number of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from streamer.adapters.adapter import DeltaSource
from streamer.plan.architectures import Architecture, architecture_for
from streamer.weights.model_config import ModelConfig

LABEL_HEAD = re.compile(
    r"(?:^|\.)(?:score|classifier|qa_outputs|logits_proj|sequence_summary\.summary|"
    r"(?:classifier|classification_head)\.(?:out_proj|linear_out|1))\.(?P<parameter>weight|bias)$"
)
"""Names of the last layer of transformers' heads for classification and question answering, with a row for each label."""

PIPELINES = {
    "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
"""PEFT's task types, and the hub's names for the same tasks."""

LABEL_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Head:
    """A model's config, updated for an adapter's task and head, with notes.

    Attributes
    ----------
    config
        The updated config.
    pipeline
        The hub's name of the task if the class changed, else empty.
    notes, advice
        What was set, and what is not known and must be passed on loading; one line each.
    """

    config: ModelConfig
    pipeline: str = ""
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@cache
def table() -> dict[str, Any]:
    """Read the table.

    ``names``: names by model type; ``tasks``: for each of PEFT's task types the patterns of class names, and each pattern's model types;
    ``ties``: for each task the model types whose head is only the tied embedding, tied by ``default`` or if the config ``stated`` it.
    """
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath("auto_classes.json").read_bytes())
    return data


def auto_class(model_type: object, task: object) -> str | None:
    """Return the class that transformers uses to load a model of this type for one of PEFT's tasks; None if there is none."""
    if not isinstance(model_type, str) or not isinstance(task, str):
        return None
    for name, types in table()["tasks"].get(task, {}).items():
        if model_type in types:
            return str(name).replace("*", table()["names"].get(model_type, ""))
    return None


def merged_architecture(config: ModelConfig, adapter: DeltaSource) -> Architecture | None:
    """Return the facts about the merged model's class: the class for the adapter's task if the base's class lacks the head.

    If the base's config names no class and the adapter no task, use the class that PEFT recorded in training.
    """
    stated = architecture_for(config)
    if adapter.describes_model:
        return stated
    task = adapter.config.get("task_type")
    cls = auto_class(config.model_type, task)
    bare = stated is None and not config.architectures
    if bare and config.model_type and cls is None and isinstance(trained := adapter.config.get("auto_mapping"), dict):
        cls = trained.get("base_model_class")
    of_task = None if cls is None else architecture_for(config, cls)
    labelled = task in LABEL_TASKS and any(LABEL_HEAD.search(c.name) for c in adapter.carried)
    headless = task in LANGUAGE_TASKS and (stated is None or stated.output_embedding is None)
    return of_task or stated if labelled or headless or bare else stated


def implied_head(config: ModelConfig, task: object, saved: Mapping[str, tuple[int, ...]],
                 names: Collection[str]) -> Head:  # fmt: skip
    """Update a model's config for the head that an adapter saves.

    Parameters
    ----------
    config
        The base's config.
    task
        PEFT's ``task_type`` in the adapter's config.
    saved
        Shapes of tensors that the adapter trained and saved whole (``modules_to_save``), by their names in the merged model.
    names
        All tensors of the merged model.
    """
    out, own = dict(config.values), config.values.get("id2label")
    notes: list[str] = []
    advice: list[str] = []
    rows = {s[0] for name, s in saved.items() if s and (m := LABEL_HEAD.search(name)) and m["parameter"] == "weight"}
    labels = rows.pop() if len(rows) == 1 else None
    if labels is not None and not config.values:
        advice.append(f"the base has no config.json: load the model with a config of num_labels={labels}")
    elif task in LABEL_TASKS and not any(map(LABEL_HEAD.search, names)):
        advice.append(
            f"the adapter is for {task}, but neither it nor the base has a known head: load the model with the class and the num_labels of "
            "its training"
        )
    if not config.values:
        return Head(config, advice=tuple(advice))
    if labels is not None and _set_labels(out, labels):
        notes.append(f"config.json says num_labels={labels}, by the rows of the saved head")
    elif labels is not None and isinstance(own, dict) and any("LABEL_" not in str(name) for name in own.values()):
        advice.append(
            "config.json keeps the base's names of labels, because there are as many as rows in the saved head: if the adapter was trained "
            "on other labels, set id2label and label2id"
        )
    cls = auto_class(config.model_type, task)
    old = next((c for c in config.architectures[:1] if isinstance(c, str)), "")
    if cls is not None and cls != old and _fits_task(str(task), old, config.model_type, saved):
        if _has_head(str(task), config, names):
            out["architectures"] = [cls]
            notes.append(f"config.json says {cls}, by the adapter's task {task}")
        elif task in LANGUAGE_TASKS:
            advice.append(
                f"the adapter is for {task}, but neither it nor the base has the head of {cls}, which loading would create with random "
                f"values: config.json keeps {old or 'no class'}; merge into the model on which the adapter was trained"
            )
    elif cls is None and labels is not None and not re.search(r"Classification|QuestionAnswering", old):
        advice.append(
            f"no class for {config.model_type!r} and the task {task} is known: load the model with the class used to train the adapter"
        )
    changed = out.get("architectures") != config.values.get("architectures")
    return Head(replace(config, values=out), PIPELINES[str(task)] if changed else "", tuple(notes), tuple(advice))


def _fits_task(task: str, old: str, model_type: object, saved: Mapping[str, tuple[int, ...]]) -> bool:
    """Test whether the task's class may replace the stated class: only a bare model or a classifier may be replaced."""
    if task in LABEL_TASKS:
        return True
    if task == "FEATURE_EXTRACTION":
        return not old or bool(saved)
    others = {auto_class(model_type, other) for other in (*LABEL_TASKS, "FEATURE_EXTRACTION")}
    return not old or old in others


def _has_head(task: str, config: ModelConfig, names: Collection[str]) -> bool:
    """Test whether the merged model has the head of the task's class, or a tie that provides it."""
    if task in LABEL_TASKS:
        return any(map(LABEL_HEAD.search, names))
    cls = auto_class(config.model_type, task)
    architecture = None if cls is None else architecture_for(config, cls)
    if task not in LANGUAGE_TASKS or architecture is None or (head := architecture.output_embedding) is None:
        return True
    # The head's outermost module holds everything between model and vocabulary: ``lm_head.decoder`` → ``lm_head.``.
    modules = tuple(f"{name.partition('.')[0]}." for name in (head, *architecture.disk_patterns(f"{head}.weight")))
    ties, model_type = table()["ties"][task], config.model_type
    # If the config states nothing, the class's default applies.
    default, possible = model_type in ties["default"], any(model_type in types for types in ties.values())
    tied = default if config.tied is None else config.tied and possible
    return tied or any(name.startswith(modules) for name in names)


def _set_labels(config: dict[str, Any], labels: int) -> bool:
    """Set the number of labels as transformers writes it; keep the base's names if there are as many. Return whether anything changed."""
    names = config.get("id2label")
    # The default number of labels depends on the class: usually 2, for BART 3.
    if (len(names) if isinstance(names, dict) else config.get("num_labels")) == labels:
        return False
    # The problem type does not follow from the number.
    for key in ("num_labels", "_num_labels", "problem_type"):
        config.pop(key, None)
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return True
