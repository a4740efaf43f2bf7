"""Find and scale down intruder dimensions in a PEFT model in memory, one weight matrix at a time.

Names and parameters are those of PEFT's own function, so changing one import line is enough::

    from streamer.peft import reduce_intruder_dimension  # instead of from peft.tuners.lora.intruders

The engine that reads files also handles the live model: `model` finds its tensors by name and presents them as a file, and `live` matches
them with the adapter's. Findings on files can be used for the model in memory, and vice versa. Needs PEFT:
``pip install 'intruder-streamer[peft]'``.
"""

from streamer.peft.live import (
    detect_intruder_dimensions,
    merge_and_unload_with_reduced_intruder_dimensions,
    reduce_intruder_dimension,
)

__all__ = ["detect_intruder_dimensions", "merge_and_unload_with_reduced_intruder_dimensions", "reduce_intruder_dimension"]  # fmt: skip
