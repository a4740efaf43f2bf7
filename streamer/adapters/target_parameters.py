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

from streamer.adapters.adapter_config import AdapterConfig, LoraBLayout
from streamer.errors import UnsupportedError
from streamer.units import listed, quoted

_LAYOUTS = get_args(LoraBLayout)

LAYOUT_KEY, LAYOUT_DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"

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
    """List a module's parameters that a config names, by their own names; PEFT's rule."""
    named = {target: target.rpartition(".")[2] for target in config.strings("target_parameters")}
    return {own for target, own in named.items() if f".{module}.{own}".endswith(f".{target}")}


def layout_refusals(config: AdapterConfig) -> list[str]:
    """Return the reason to refuse the config's order of lora_B's columns, if any."""
    rows, columns = _layouts(config)
    stated = config.stated.lora_b_layout
    if rows - {"grouped_by_expert"}:
        return [f"lora_A_layout is {listed(sorted(rows))}, expected grouped_by_expert"]
    if len(columns) > 1 or columns - ({stated} if stated else {*_LAYOUTS}):
        expected = f"{stated} (as --lora-b-layout says; leave it out)" if stated else " or ".join(_LAYOUTS)
        return [f"{LAYOUT_KEY} is {listed(sorted(columns))}, expected {expected} for all experts"]
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
    layout, card = stored_layout(config) or config.stated.lora_b_layout, path / "README.md"
    # Adapters written by streamer are in PEFT's order, even if their card names Unsloth as the trainer.
    if layout is None and "streamer" not in metadata:
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        if "unsloth" in f"{json.dumps([config.values, dict(metadata)])}{text}".lower():
            raise UnsupportedError(
                f"{config.path}: refused: LoRA on stacked experts, and config, metadata or README.md names Unsloth, which stored lora_B "
                "grouped by expert until September 2026; pass --lora-b-layout grouped_by_expert if it wrote this one before then, else "
                "--lora-b-layout rank_major"
            )
    return layout == "grouped_by_expert"


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
