"""The table of a fit: its commands take the shares and the inputs as they were given."""

from __future__ import annotations

from typing import Any

from streamer.cli.fitting_table import fitting_table


def facts(*keeps: float) -> dict[str, Any]:
    """What a table is made from; figures are one number each."""
    figures = {f"{name}{end}": 0.5 for name in ("kept", "forgetting", "divergence") for end in ("", "_se")}
    sets = [{"keep": keep, "mu": None, **figures, "shrink": None} for keep in keeps]
    texts = {text: {"held": {"sequences": 6}} for text in ("general", "task")}
    return {
        "texts": texts,
        "sets": sets,
        "base": {},
        "adapter": {},
        "factored": True,
        "quantized": False,
    }


def test_the_command_names_the_share_as_the_file_takes_it() -> None:
    text = fitting_table(facts(1 / 3, 2 / 3), ("base", "adapter"), "c.safetensors")
    assert "--coefficients c.safetensors --keep 0.333333" in text


def test_the_commands_take_the_inputs_as_the_fit_took_them() -> None:
    given = {**facts(0.9), "base": {"architecture": "LlamaForCausalLM"}, "adapter": {"base_is_residual": True}}
    text = fitting_table(given, ("base", "adapter"), "c.safetensors")
    assert text.count("--coefficients c.safetensors --base-is-residual --architecture LlamaForCausalLM") == 2
