"""Keep what the delta answers to the task's inputs, and take away what it answers to general ones; see `linalg.regmean`."""

from __future__ import annotations

from typing import ClassVar

from streamer.methods.fitted import ByFit
from streamer.methods.method import MethodName


class RegMean(ByFit):
    """``Δ' = Δ C̃_t (C̃_t + μ C_g)⁻¹``, corrected layer by layer: a fit holds the right factors, the left ones stay."""

    name: ClassVar[MethodName] = "regmean"
    keeps_left: ClassVar[bool] = True
    colour: ClassVar[str] = "#6b5b00"
    about: ClassVar[str] = "keep only the response to the task's inputs, from `streamer fit`"
    card: ClassVar[str] = (
        "What the adapter adds to a weight answers the task's inputs as it did, and what it answered to general text is taken away: its "
        "right factors (`lora_A`, of some stacked experts `lora_B`) were fitted to the inputs of each module, the others stay.\n"
    )
    changes: ClassVar[str] = "right factors by their inputs"
