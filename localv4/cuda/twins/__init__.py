"""The twins of all operations, by the function of the CPU: `module.name` below localv4.kernels."""

from localv4.cuda.twin import Twin
from localv4.cuda.twins.attention import ATTENTION
from localv4.cuda.twins.float_products import FLOAT_PRODUCTS
from localv4.cuda.twins.gemm import MANY_PRODUCTS
from localv4.cuda.twins.gemm_floats import MANY_FLOAT_PRODUCTS
from localv4.cuda.twins.indexer import INDEXER
from localv4.cuda.twins.pooling import POOLING
from localv4.cuda.twins.products import PRODUCTS
from localv4.cuda.twins.router import ROUTER
from localv4.cuda.twins.rows import ROWS
from localv4.cuda.twins.streams import STREAMS

TWINS: dict[str, Twin] = {
    **PRODUCTS,
    **FLOAT_PRODUCTS,
    **MANY_PRODUCTS,
    **MANY_FLOAT_PRODUCTS,
    **ROWS,
    **STREAMS,
    **POOLING,
    **ROUTER,
    **ATTENTION,
    **INDEXER,
}
