"""Read and edit a model's ``config.json``, with each question and each edit in one place.

A vision-language model keeps its language model's config under ``text_config``; a key may be at the top level, there, or in both places.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from streamer.storage.checkpoint import PIPELINE_NAME, is_pipeline, read_json_object

ConfigValues = dict[str, Any]

MODEL_CONFIG = "config.json"

TOP_VOCABULARY = ("vocab_size",)

TEXT_VOCABULARY = ("text_config", "vocab_size")
"""Paths under which most configs state the number of tokens."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ModelConfig:
    """Values of a ``config.json``; empty if the checkpoint has none.

    Attributes
    ----------
    architecture
        Class that the user names because the config names none, or an unknown one.
    pipeline
        Whether the values are the ``model_index.json`` of a diffusers pipeline, whose components have configs of their own.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    pipeline: bool = False

    @property
    def text(self) -> Mapping[str, Any]:
        """Return the language model's part of a vision-language config, else {}."""
        text = self.values.get("text_config")
        return text if isinstance(text, dict) else {}

    def stated(self, *keys: str) -> list[Any]:
        """Return the values of these keys, first from the top level, then from the language model's part."""
        return [part[key] for part in (self.values, self.text) for key in keys if key in part]

    @property
    def model_type(self) -> str | None:
        """Return transformers' name of the architecture."""
        model_type = self.values.get("model_type")
        return model_type if isinstance(model_type, str) else None

    @property
    def architectures(self) -> list[Any]:
        """List the classes that the model may be loaded as."""
        classes = self.values.get("architectures")
        return classes if isinstance(classes, list) else []

    @property
    def hidden_size(self) -> int:
        """Return the width of the language model; 0 if the config does not state it."""
        hidden = (self.text or self.values).get("hidden_size")
        return hidden if isinstance(hidden, int) else 0

    @property
    def vocab_size(self) -> int | None:
        """Return the number of rows of the embedding."""
        return next((n for n in self.stated("vocab_size") if type(n) is int), None)

    @property
    def vocabulary_keys(self) -> tuple[str, ...]:
        """Return the path under which a model of unknown class states the number of rows of its embedding."""
        return TEXT_VOCABULARY if TEXT_VOCABULARY[-1] in self.text else TOP_VOCABULARY

    @property
    def tied(self) -> bool | None:
        """Return whether the config ties ``lm_head`` to the embedding; None if the class's default applies. A pipeline has no head."""
        if self.pipeline:
            return False
        stated = self.stated("tie_word_embeddings")
        return any(stated) if stated else None

    @property
    def quantization(self) -> ConfigValues:
        """Return the quantization config, or {}."""
        stated = (value for value in self.stated(*QUANTIZATION_KEYS) if isinstance(value, dict))
        return next((dict(value) for value in stated if value), {})

    def with_vocabulary(self, rows: int, keys: tuple[str, ...]) -> ModelConfig:
        """Set the number of tokens at a path of keys, and also at the top level and in the language model's part if both state it.

        Copies of the number are kept equal: ``decoder_vocab_size`` (Marian), and a top-level copy of a decoder's number (Canary).
        """
        places = {keys}
        part = reduce(lambda inner, key: inner.get(key, {}), keys[:-1], self.values)
        if self.values.get("vocab_size", -1) == part.get(keys[-1]):
            places.add(TOP_VOCABULARY)
        if keys == TOP_VOCABULARY and self.values.get("decoder_vocab_size", -1) == self.vocab_size:
            places.add(("decoder_vocab_size",))
        if keys in (TOP_VOCABULARY, TEXT_VOCABULARY):
            stated = {TOP_VOCABULARY: self.values, TEXT_VOCABULARY: self.text}
            places |= {place for place, part in stated.items() if place[-1] in part}
        out = dict(self.values)
        for *path, key in places:
            _part(out, path)[key] = rows
        return replace(self, values=out)

    def untied(self, keys: Iterable[tuple[str, ...]]) -> ModelConfig:
        """State at each path of keys that head and embedding are separate; a top-level key is also set for the language model."""
        out: ConfigValues = dict(self.values)
        for *path, key in keys:
            _part(out, path)[key] = False
            if not path and self.text:
                out["text_config"] = {**out["text_config"], key: False}
        return replace(self, values=out)

    def with_dtype(self, dtype: str) -> ModelConfig:
        """State another dtype wherever the config or a part of it states one."""

        def stated(part: Mapping[str, Any]) -> ConfigValues:
            configs = {
                k: v for k, v in part.items() if k.endswith("_config") and isinstance(v, dict)
            }
            inner = {key: stated(config) for key, config in configs.items()}
            return {**part, **inner, **dict.fromkeys(part.keys() & {"dtype", "torch_dtype"}, dtype)}

        return replace(self, values=stated(self.values))

    def unquantized(self) -> ModelConfig:
        """Remove every statement that the model is quantized."""

        def rest(part: Mapping[str, Any]) -> ConfigValues:
            return {key: value for key, value in part.items() if key not in QUANTIZATION_KEYS}

        out = rest(self.values)
        if isinstance(out.get("text_config"), dict):
            out["text_config"] = rest(self.text)
        return replace(self, values=out)


def _part(config: ConfigValues, path: Iterable[str]) -> ConfigValues:
    """Copy the parts of a config along a path, replacing them in place, and return the last."""
    for name in path:
        inner = config.get(name)
        config[name] = config = dict(inner) if isinstance(inner, Mapping) else {}
    return config


def read_model_config(directory: Path | None) -> ModelConfig:
    """Read a model's ``config.json``, or a pipeline's ``model_index.json``; empty if there is none.

    ModelOpt's older exports state their quantization in ``hf_quant_config.json`` alone; it is added as newer ones write it.

    Raises
    ------
    StorageError, FormatError
        If a file cannot be read or is not valid JSON.
    """
    if directory and is_pipeline(directory):
        return ModelConfig(_read(directory / PIPELINE_NAME), pipeline=True)
    values = _read(directory / MODEL_CONFIG) if directory else {}
    if directory and values and not ModelConfig(values).quantization:
        match _read(directory / "hf_quant_config.json"):
            case {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": str()} as stated,
            }:
                values |= {"quantization_config": {"quant_method": "modelopt", **stated}}
    return ModelConfig(values)


def _read(path: Path) -> ConfigValues:
    """Read a JSON object as transformers writes it, allowing Infinity and NaN; {} if there is none."""
    return read_json_object(path, json.loads) if path.exists() else {}
