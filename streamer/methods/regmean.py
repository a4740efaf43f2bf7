"""Keep the delta's response to the task's inputs, and remove its response to general inputs; see `linalg.regmean`."""

from __future__ import annotations

from typing import ClassVar

from streamer.methods.fitted import ByFit
from streamer.methods.method import MethodName


class RegMean(ByFit):
    """``Δ' = Δ C̃_t (C̃_t + μ C_g)⁻¹``, corrected layer by layer; a fit holds the new right factors, and the left factors stay."""

    name: ClassVar[MethodName] = "regmean"
    keeps_left: ClassVar[bool] = True
    about: ClassVar[str] = "keep only the response to the task's inputs (`streamer fit`)"
    card: ClassVar[str] = (
        "The adapter keeps its response to the task's inputs, and its response to general text was removed: its "
        "right factors (`lora_A`, in some stacked experts `lora_B`) were fitted to the inputs of each module.\n"
    )
    changes: ClassVar[str] = "right factors by their inputs"
