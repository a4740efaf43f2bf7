"""Find and scale down intruder dimensions in a PEFT model that is in memory, one weight matrix at a time.

The names and parameters are those of PEFT's own function, so that one import line is the whole change::

    from streamer.peft import reduce_intruder_dimension  # in place of peft.tuners.lora.intruders

A live model is presented to the same engine that reads files: `tensors` gives its tensors the form of a file, `model` finds them by name,
and `plan` matches them. Findings on files serve the model in memory, and the reverse. It takes PEFT:
``pip install 'intruder-streamer[peft]'``.
"""

from streamer.peft.detection import detect_intruder_dimensions
from streamer.peft.merging import merge_and_unload_with_reduced_intruder_dimensions
from streamer.peft.reduction import reduce_intruder_dimension

__all__ = [
    "detect_intruder_dimensions",
    "merge_and_unload_with_reduced_intruder_dimensions",
    "reduce_intruder_dimension",
]
