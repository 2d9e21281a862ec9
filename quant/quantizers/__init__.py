"""Weights to fewer bits: searches of codes and scales with the least weighted error."""

from quant.quantizers.error_feedback import Feedback, prepare_feedback
from quant.quantizers.quantize import PACKED_KIN, Method, Quantized, has_nonfinite, quantize_rows

__all__ = [
    "PACKED_KIN",
    "Feedback",
    "Method",
    "Quantized",
    "has_nonfinite",
    "prepare_feedback",
    "quantize_rows",
]
