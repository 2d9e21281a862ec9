"""The twins of all operations, by the function of the CPU: `module.name` below localv4.kernels."""

from localv4.cuda.twin import Twin
from localv4.cuda.twins.float_products import FLOAT_PRODUCTS
from localv4.cuda.twins.products import PRODUCTS
from localv4.cuda.twins.rows import ROWS

TWINS: dict[str, Twin] = {**ROWS, **PRODUCTS, **FLOAT_PRODUCTS}
