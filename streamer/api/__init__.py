"""The library's functions: what the command line does, for callers in Python."""

from streamer.api.detection import detect_intruder_dimensions
from streamer.api.evaluation import evaluate_variants
from streamer.api.fitting import fit_coefficients
from streamer.api.merging import iter_merged, merge_with_reduced_intruder_dimensions
from streamer.api.mitigation import reduce_intruder_dimension
from streamer.api.report import write_report
from streamer.api.reporting import report_coefficients
from streamer.api.verification import verify_output

__all__ = [
    "detect_intruder_dimensions",
    "evaluate_variants",
    "fit_coefficients",
    "iter_merged",
    "merge_with_reduced_intruder_dimensions",
    "reduce_intruder_dimension",
    "report_coefficients",
    "verify_output",
    "write_report",
]
