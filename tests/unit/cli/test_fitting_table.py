"""The table of a fit: what stands in it of several coefficients and of one, and the commands behind it."""

from __future__ import annotations

from typing import Any

import pytest

from streamer.cli.fitting_table import fitting_table


def facts(parameters: int, *keeps: float) -> dict[str, Any]:
    """What a table is made from; figures are one number each."""
    figures = {f"{name}{end}": 0.5 for name in ("kept", "forgetting", "divergence") for end in ("", "_se")}
    coefficients = {"mean": 0.4321, "near_0": 0, "near_1": 0}
    sets = [{"keep": keep, "mu": None, **figures, "coefficients": coefficients, "shrink": None} for keep in keeps]
    texts = {text: {"held": {"sequences": 6}} for text in ("general", "task")}
    return {
        "parameters": parameters,
        "texts": texts,
        "sets": sets,
        "base": {},
        "adapter": {},
        "factored": True,
        "quantized": False,
    }


@pytest.mark.parametrize(
    ("parameters", "there", "absent", "chosen"), [(1, "lambda", "mu", "lambda"), (16, "mu", "lambda", "the set")]
)
def test_one_coefficient_is_the_lambda_of_a_shrink(parameters: int, there: str, absent: str, chosen: str) -> None:
    text = fitting_table(facts(parameters, 0.9), ("base", "adapter"), "c.safetensors")
    heads = text.splitlines()[0].split()
    assert there in heads
    assert absent not in heads
    assert ("shrink" in heads) == (parameters > 1)
    assert ("that shrink's KL left" in text) == (parameters > 1)
    assert ("0.432" in text) == (parameters == 1)
    assert f"on which {chosen} was chosen" in text


def test_the_command_names_the_share_as_the_file_takes_it() -> None:
    text = fitting_table(facts(16, 1 / 3, 2 / 3), ("base", "adapter"), "c.safetensors")
    assert "--coefficients c.safetensors --keep 0.333333" in text


def test_the_commands_take_the_inputs_as_the_fit_took_them() -> None:
    given = {**facts(16, 0.9), "base": {"architecture": "LlamaForCausalLM"}, "adapter": {"base_is_residual": True}}
    text = fitting_table(given, ("base", "adapter"), "c.safetensors")
    assert text.count("--coefficients c.safetensors --base-is-residual --architecture LlamaForCausalLM") == 2
