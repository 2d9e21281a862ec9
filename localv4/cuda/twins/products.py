"""Twins of the products of one token with packed weights (`kernels.formats`)."""

from collections.abc import Callable
from dataclasses import dataclass

from localv4.cuda.twin import Kernel, Twin, Words
from localv4.kernels.packed import BLOCK, GROUP_ROWS, MX4, Q4, Q8, PackedFormat

# as in kernels/single_token.cuh
THREADS = 256
TABLE_FLOATS = 4096

FEW_GROUPS = 512
"""Row groups below which two blocks of threads share a group, so that all of a GPU has work."""

QUAD = 4  # rows of a task


@dataclass(frozen=True, slots=True)
class TokenFormat:
    """How a format is read: so many tasks of a thread at a time, and that many tables of sums."""

    fmt: PackedFormat
    together: int
    tables: int = 2

    @property
    def blocks(self) -> int:
        """Blocks of a superblock."""
        return self.fmt.columns // BLOCK

    def table_bytes(self, slots: int, cols: int, rows: int) -> int:
        """Return the shared memory for `rows` rows of each slot (`single_token.cuh`)."""
        most = TABLE_FLOATS // rows // slots // self.blocks * self.blocks
        at_once = min(cols // BLOCK, max(most, self.blocks))
        return 4 * self.tables * slots * (at_once + 1) * rows


FORMATS = (TokenFormat(MX4, 2), TokenFormat(Q4, 2), TokenFormat(Q8, 1))


def _groups_together(form: TokenFormat, groups: int, cols: int) -> int:
    """Return how many groups a block of threads computes: as many as keep its threads busy."""
    tasks = GROUP_ROWS // QUAD * cols // BLOCK
    wanted = THREADS * form.together // tasks
    return max(1, min(wanted, THREADS // GROUP_ROWS, groups // FEW_GROUPS))


def _matvec(form: TokenFormat) -> Twin:
    def slots(words: Words) -> int:
        return _groups_together(form, words[2], words[3])

    def many(words: Words) -> int:
        return 0 if words[2] < FEW_GROUPS else -(-words[2] // slots(words))

    def few(words: Words) -> int:
        return 2 * words[2] if words[2] < FEW_GROUPS else 0

    def many_bytes(words: Words) -> int:
        return form.table_bytes(slots(words), words[3], GROUP_ROWS)

    def few_bytes(words: Words) -> int:
        return form.table_bytes(1, words[3], GROUP_ROWS // 2)

    name = form.fmt.name.lower()
    return Twin(
        "aiiaaaa",
        (
            Kernel("matvec.cu", f"{name}_matvec", THREADS, many, many_bytes),
            Kernel("matvec.cu", f"{name}_matvec_few", THREADS, few, few_bytes),
        ),
    )


def _twins(make: Callable[[TokenFormat], Twin], kind: str) -> dict[str, Twin]:
    return {f"formats.{form.fmt.name.lower()}_{kind}": make(form) for form in FORMATS}


PRODUCTS = _twins(_matvec, "matvec")
