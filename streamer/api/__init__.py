"""The library's functions: what the command line does, for callers in Python."""

from streamer.api.detection import detect_intruder_dimensions
from streamer.api.evaluation import evaluate_variants
from streamer.api.merging import iter_merged, merge_with_reduced_intruder_dimensions
from streamer.api.mitigation import reduce_intruder_dimension
from streamer.api.report import write_report
from streamer.api.verification import verify_output

__all__ = [
    "detect_intruder_dimensions",
    "evaluate_variants",
    "iter_merged",
    "merge_with_reduced_intruder_dimensions",
    "reduce_intruder_dimension",
    "verify_output",
    "write_report",
]
