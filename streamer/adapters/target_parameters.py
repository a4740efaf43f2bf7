"""Find LoRA on parameters of a module, as PEFT's ``target_parameters`` writes it: the experts of a mixture above all.

PEFT wraps the module once for each parameter, the one registered first innermost. The wrappers' factors stand under the module's
name, the inner ones under ``base_layer`` once or more; which parameter each is of is not stored. lora_A is (E·r, in), its row
e·r + k expert e's k-th; lora_B is (out, r·E), its column k·E + e expert e's k-th.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamer.adapters.adapter_config import AdapterConfig
from streamer.units import listed

INNER = ".base_layer"


@dataclass(frozen=True)
class Wrapped:
    """The wrappers of one module.

    Attributes
    ----------
    module
        Its path in the model.
    parameters
        The parameters of it that the config names: as many as there are wrappers.
    factors
        Names of lora_A and lora_B of each wrapper, the innermost first.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the wrappers on disk."""
        return tuple(self.module + INNER * depth for depth in range(len(self.factors)))

    def matched_as(self, parameter: str) -> str:
        """Return the name under which a base is searched for a parameter."""
        return f"{self.module}.{parameter}".removesuffix(".weight")


def find_wrapped(
    pairs: Mapping[str, Mapping[str, str]], config: AdapterConfig, is_matrix: Callable[[str, str], bool]
) -> tuple[list[Wrapped], list[str]]:
    """Find the wrapped modules among those that have factors, and what is wrong with any, one phrase each.

    Parameters
    ----------
    pairs
        Module → {"A": tensor, "B": tensor}; inner wrappers stand under their names on disk.
    is_matrix
        Whether a parameter's lora_A has as many rows as the rank: then it is a plain matrix, and no stack.
    """
    found, wrong = [], []
    for name, factors in pairs.items():
        if name.endswith(INNER):
            continue
        layers = [factors]
        while (inner := pairs.get(name + INNER * len(layers))) is not None:
            layers.append(inner)
        parameters = targeted_parameters(config, name)
        # ``gate_up_proj`` names a parameter of any module that has one; where lora_A is of one matrix, it is of the module's weight.
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
    """List the parameters of a module that a config names, by their own names."""
    return {t.rpartition(".")[2] for t in config.strings("target_parameters") if _names(t, module)}


def _names(target: str, module: str) -> bool:
    """Say whether an entry of target_parameters is a parameter of this module, by PEFT's rule."""
    name = f"{module}.{target.rpartition('.')[2]}"
    return name == target or name.endswith("." + target)
