"""How fast a GPU is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """What a GPU does in a second.

    `copy_bytes_s` are read and written together by a copy inside the GPU, `upload_bytes_s` come
    from the host, `product_ops_s` are operations of products of a prompt with packed weights, a
    multiply-add being two.
    """

    copy_bytes_s: float
    upload_bytes_s: float
    product_ops_s: float
