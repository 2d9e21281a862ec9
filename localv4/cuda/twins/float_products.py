"""Twins of the products of one token with packed floats (`kernels.float_operations`)."""

from localv4.cuda.twin import Kernel, Twin, Words

SOURCE = "float_matvec.cu"
KINDS = "aiiaaaa"

FEW_GROUPS = 264
"""Row groups below which a group gets more threads: two for each multiprocessor of a large GPU."""


def _many(words: Words) -> int:
    return words[2] if words[2] >= FEW_GROUPS else 0


def _few(words: Words) -> int:
    return words[2] if words[2] < FEW_GROUPS else 0


FLOAT_PRODUCTS = {
    f"float_operations.{name}_matvec": Twin(
        KINDS,
        (
            Kernel(SOURCE, f"{name}_matvec", 256, _many),
            Kernel(SOURCE, f"{name}_matvec_few", 1024, _few),
        ),
    )
    for name in ("f8", "b16", "f32r")
}
