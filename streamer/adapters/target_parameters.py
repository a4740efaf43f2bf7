"""Find LoRA on parameters of a module, as PEFT's ``target_parameters`` writes it, typically for the experts of a mixture.

PEFT wraps the module once for each parameter; the parameter registered first is innermost. The factors are stored under the module's
name, with ``base_layer`` appended once or more for inner wrappers; which parameter each belongs to is not stored. lora_A is (E·r, in),
and its row e·r + k is expert e's k-th. lora_B is (out, r·E), and its column k·E + e is expert e's k-th. Until September 2026 Unsloth
stored that column at e·r + k. Shapes and norms are the same, so only the config or the user can say which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig
from streamer.adapters.config_keys import LAYOUT_DETAILS, LAYOUT_KEY
from streamer.adapters.stated import LoraBLayout
from streamer.errors import UnsupportedError
from streamer.units import listed, quoted

_LAYOUTS = get_args(LoraBLayout)

INNER = ".base_layer"


@dataclass(frozen=True)
class Wrapped:
    """Wrappers of one module.

    Attributes
    ----------
    module
        Path of the module in the model.
    parameters
        The module's parameters that the config names, one for each wrapper.
    factors
        Names of each wrapper's lora_A and lora_B, the innermost first.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the wrappers' names on disk."""
        return tuple(self.module + INNER * depth for depth in range(len(self.factors)))

    def matched_as(self, parameter: str) -> str:
        """Return the name by which to search a base for a parameter."""
        return f"{self.module}.{parameter}".removesuffix(".weight")


def find_wrapped(
    pairs: Mapping[str, Mapping[str, str]], config: AdapterConfig, is_matrix: Callable[[str, str], bool]
) -> tuple[list[Wrapped], list[str]]:
    """Find the wrapped modules among those with factors, and everything that is wrong with them, one phrase each.

    Parameters
    ----------
    pairs
        Module → {"A": tensor, "B": tensor}; inner wrappers appear under their names on disk.
    is_matrix
        Tests whether a parameter's lora_A has as many rows as the rank; the parameter is then a plain matrix, not a stack.
    """
    found, wrong = [], []
    for name, factors in pairs.items():
        if name.endswith(INNER):
            continue
        layers = [factors]
        while (inner := pairs.get(name + INNER * len(layers))) is not None:
            layers.append(inner)
        parameters = targeted_parameters(config, name)
        # ``gate_up_proj`` names a parameter of any module that has one; if lora_A fits a single matrix, it belongs to the module's weight.
        bare = parameters & set(config.strings("target_parameters")) - {"weight"}
        if bare and len(layers) == 1 and is_matrix(name, factors["A"]):
            parameters -= bare
        if not parameters or (parameters == {"weight"} and is_matrix(f"{name}.weight", factors["A"])):
            continue
        if len(parameters) != len(layers):
            wrong.append(
                f"module {name!r}: target_parameters names {len(parameters)} of its parameters ({listed(sorted(parameters))}), "
                f"but there are factors for {len(layers)}"
            )
        found.append(Wrapped(name, tuple(sorted(parameters)), tuple((f["A"], f["B"]) for f in reversed(layers))))
    known = {name for w in found for name in w.layers}
    wrong += [
        f"module {name!r}: target_parameters names none of its parameters"
        for name in pairs
        if name.endswith(INNER) and name not in known
    ]
    return found, wrong


def targeted_parameters(config: AdapterConfig, module: str) -> set[str]:
    """List a module's parameters that a config names, by their own names."""
    return {t.rpartition(".")[2] for t in config.strings("target_parameters") if _names(t, module)}


def _names(target: str, module: str) -> bool:
    """Test whether an entry of target_parameters is a parameter of this module, by PEFT's rule."""
    name = f"{module}.{target.rpartition('.')[2]}"
    return name == target or name.endswith("." + target)


def layout_refusals(config: AdapterConfig) -> list[str]:
    """Return the reason to refuse the config's order of lora_B's columns, if any."""
    rows, columns = _layouts(config)
    expected = f"expected {' or '.join(_LAYOUTS)}"
    if rows - {"grouped_by_expert"}:
        return [f"lora_A_layout is {listed(sorted(rows))}, expected grouped_by_expert"]
    if len(columns) > 1 or columns - {*_LAYOUTS}:
        return [f"{LAYOUT_KEY} is {listed(sorted(columns))}, {expected} for all experts"]
    if (stated := config.stated.lora_b_layout) is not None and columns - {stated}:
        return [f"{LAYOUT_KEY} is {columns.pop()}, and --lora-b-layout says {stated}; leave that option out"]
    return []


def stored_layout(config: AdapterConfig) -> str | None:
    """Return the order of lora_B's columns that a config states, or None."""
    return next(iter(_layouts(config)[1]), None)


def without_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that state the order of lora_B's columns."""
    return {key: value for key, value in config.items() if key not in (LAYOUT_KEY, LAYOUT_DETAILS)}


def is_grouped(config: AdapterConfig, path: Path, metadata: Mapping[str, str]) -> bool:
    """Test whether the columns of an adapter's lora_B are grouped by expert.

    Parameters
    ----------
    path
        The adapter's directory.
    metadata
        Metadata of the weights file.

    Raises
    ------
    UnsupportedError
        If Unsloth may have written the adapter, and neither its config nor the user states the order.
    """
    layout = stored_layout(config) or config.stated.lora_b_layout
    # Adapters written by streamer are in PEFT's order, even if their card names Unsloth as the trainer.
    if layout is None and "streamer" not in metadata and (where := _naming_unsloth(config, path, metadata)):
        raise UnsupportedError(
            f"{config.path}: refused: LoRA on stacked experts, and {where} names Unsloth, which stored lora_B grouped by expert until "
            "September 2026; pass --lora-b-layout grouped_by_expert if it wrote this one before then, else --lora-b-layout rank_major"
        )
    return layout == "grouped_by_expert"


def _naming_unsloth(config: AdapterConfig, path: Path, metadata: Mapping[str, str]) -> str:
    """Return the key or line of an adapter's files that names Unsloth, or ""."""
    card = path / "README.md"
    lines = card.read_text("utf-8", "replace").splitlines() if card.is_file() else []
    texts = {
        **{f"{quoted(key, 40)} of {CONFIG_NAME}": json.dumps({key: value}) for key, value in config.values.items()},
        **{f"{quoted(key, 40)} of the metadata of {WEIGHTS_NAME}": f"{key} {value}" for key, value in metadata.items()},
        **{f"line {i} of README.md": line for i, line in enumerate(lines, 1)},
    }
    return next((where for where, text in texts.items() if "unsloth" in text.lower()), "")


def _layouts(config: AdapterConfig) -> tuple[set[str], set[str]]:
    """Collect every order that a config states for the rows of lora_A and for the columns of lora_B."""
    details = config.get(LAYOUT_DETAILS)
    details = details if isinstance(details, dict) else {}
    parameters = details.get("parameters")
    each = [one for one in parameters.values() if isinstance(one, dict)] if isinstance(parameters, dict) else []
    rows = [one.get("lora_A_layout") for one in (details, *each)]
    columns = [config.get(LAYOUT_KEY), *(one.get(LAYOUT_KEY) for one in (details, *each))]
    return {_said(r) for r in rows if r is not None}, {_said(c) for c in columns if c is not None}


def _said(layout: object) -> str:
    return layout if isinstance(layout, str) and layout in _LAYOUTS else quoted(layout, 30)
