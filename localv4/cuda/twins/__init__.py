"""The twins of all operations, by the function of the CPU: `module.name` below localv4.kernels."""

from localv4.cuda.twin import Twin
from localv4.cuda.twins.rows import ROWS
from localv4.cuda.twins.streams import STREAMS

TWINS: dict[str, Twin] = {**ROWS, **STREAMS}
