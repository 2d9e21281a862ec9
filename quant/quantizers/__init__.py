"""Weights to fewer bits: searches of codes and scales with the least weighted error."""

from quant.quantizers.quantize import PACKED_KIN, Method, Quantized, has_nonfinite, quantize_rows

__all__ = ["PACKED_KIN", "Method", "Quantized", "has_nonfinite", "quantize_rows"]
