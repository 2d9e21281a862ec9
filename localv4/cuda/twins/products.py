"""Twins of the products of one token with packed weights (`kernels.formats`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from localv4.cuda.twin import BESIDE, Kernel, Twin, Words
from localv4.kernels.packed import BLOCK, GROUP_ROWS, MX4, Q4, Q8, PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6

# as in kernels/single_token.cuh
THREADS = 256
TABLE_ROWS = 4096
DOWN_ROWS = 8
FEW_ROWS = 8

FEW_GROUPS = 512
"""Row groups below which two blocks of threads share a group, so that all of a GPU has work."""

QUAD = 4  # rows of a task

KQUANT_MODULE = "kquant_operations"


@dataclass(frozen=True, slots=True)
class TokenFormat:
    """How a format is read (`single_token.cuh`): so many tasks of a thread at a time.

    In shared memory there are `floats` for each row and block, and `heads` for each row and
    superblock. `module` of `localv4.kernels` has the operations of the CPU.
    """

    fmt: PackedFormat
    together: int
    floats: int = 2
    heads: int = 0
    module: str = "formats"

    @property
    def blocks(self) -> int:
        """Blocks of a superblock."""
        return self.fmt.columns // BLOCK

    def source(self, what: str) -> str:
        """Return the file of kernels for matrices or experts."""
        return f"kquant_{what}.cu" if self.module == KQUANT_MODULE else f"{what}.cu"

    def group_bytes(self, cols: int) -> int:
        """Return the bytes of a group of rows."""
        return cols // self.fmt.columns * self.fmt.superblock_bytes

    def table_bytes(self, slots: int, cols: int, rows: int) -> int:
        """Return the shared memory for `rows` rows of each slot."""
        most = TABLE_ROWS // rows // slots // self.blocks * self.blocks
        at_once = min(cols // BLOCK, max(most, self.blocks))
        heads = self.heads * at_once // self.blocks
        return 4 * slots * rows * (self.floats * (at_once + 1) + heads)


FORMATS = (
    TokenFormat(MX4, 2),
    TokenFormat(Q4, 2),
    TokenFormat(Q8, 1),
    TokenFormat(Q4K, 2, 2, 2, KQUANT_MODULE),
    TokenFormat(Q6, 1, 1, 1, KQUANT_MODULE),
    TokenFormat(Q3, 2, 1, 1, KQUANT_MODULE),
    TokenFormat(Q2, 2, 2, 2, KQUANT_MODULE),
    TokenFormat(IQ2, 2, 1, 1, KQUANT_MODULE),
)


def _groups_together(form: TokenFormat, groups: int, cols: int) -> int:
    """Return how many groups a block of threads computes: as many as keep its threads busy."""
    tasks = GROUP_ROWS // QUAD * cols // BLOCK
    wanted = THREADS * form.together // tasks
    return max(1, min(wanted, THREADS // GROUP_ROWS, groups // FEW_GROUPS))


def _many_or_few(
    name: str,
    source: str,
    groups: Callable[[Words], int],
    together: Callable[[Words], int],
    table_bytes: Callable[[Words, int, int], int],
    joins: int = 4,
) -> tuple[Kernel, Kernel]:
    """Return the kernels for many row groups, some of them together, and for few.

    `table_bytes(words, together, rows)` is the shared memory for so many rows of each group.
    """

    def has_many(words: Words) -> bool:
        return groups(words) * max(1, words[BESIDE]) >= FEW_GROUPS

    def many(words: Words) -> int:
        return -(-groups(words) // together(words)) if has_many(words) else 0

    def few(words: Words) -> int:
        return 0 if has_many(words) else GROUP_ROWS // FEW_ROWS * groups(words)

    def many_bytes(words: Words) -> int:
        return table_bytes(words, together(words), GROUP_ROWS)

    def few_bytes(words: Words) -> int:
        return table_bytes(words, 1, FEW_ROWS)

    return (
        Kernel(source, name, THREADS, many, many_bytes, joins=joins),
        Kernel(source, f"{name}_few", THREADS, few, few_bytes, joins=4),
    )


def _matvec(form: TokenFormat) -> Twin:
    def groups(words: Words) -> int:
        return words[2]

    def together(words: Words) -> int:
        return _groups_together(form, words[2], words[3])

    def table_bytes(words: Words, slots: int, rows: int) -> int:
        return form.table_bytes(slots, words[3], rows)

    name, source = f"{form.fmt.name.lower()}_matvec", form.source("matvec")
    kernels = _many_or_few(name, source, groups, together, table_bytes)
    return Twin("aiiaaaa", kernels, weights=lambda words: words[2] * form.group_bytes(words[3]))


def _gate_up(form: TokenFormat) -> Twin:
    def groups(words: Words) -> int:
        return words[2] * words[3]

    def one(words: Words) -> int:
        return 1

    def table_bytes(words: Words, together: int, rows: int) -> int:
        return form.table_bytes(2 * together, words[4], rows)  # gate and up

    name, source = f"{form.fmt.name.lower()}_gate_up", form.source("experts")
    kernels = _many_or_few(name, source, groups, one, table_bytes, joins=3)
    return Twin(
        "tiiiaaaaf", kernels, weights=lambda words: 2 * groups(words) * form.group_bytes(words[4])
    )


DOWN_KINDS = "tiiiaaaaaii"


def _down(form: TokenFormat) -> Twin:
    def blocks(words: Words) -> int:
        return GROUP_ROWS // DOWN_ROWS * words[3]

    def shared(words: Words) -> int:
        fitting = min(TABLE_ROWS // DOWN_ROWS // (words[4] // BLOCK), THREADS // DOWN_ROWS)
        return form.table_bytes(max(1, min(words[2], fitting)), words[4], DOWN_ROWS)

    name = f"{form.fmt.name.lower()}_down"
    kernel = Kernel(form.source("experts"), name, THREADS, blocks, shared, joins=4)
    return Twin(
        DOWN_KINDS,
        (kernel,),
        weights=lambda words: words[2] * words[3] * form.group_bytes(words[4]),
    )


def _down_parts(form: TokenFormat) -> Twin:
    def blocks(words: Words) -> int:
        return words[2] * words[3]

    def shared(words: Words) -> int:
        return form.table_bytes(1, words[4], GROUP_ROWS)

    name = f"{form.fmt.name.lower()}_down_parts"
    return Twin(DOWN_KINDS, (Kernel(form.source("experts"), name, THREADS, blocks, shared),))


def _combined(words: Words) -> int:
    return -(-words[4] // THREADS)


def _twins(make: Callable[[TokenFormat], Twin], kind: str) -> dict[str, Twin]:
    return {f"{form.module}.{form.fmt.name.lower()}_{kind}": make(form) for form in FORMATS}


PRODUCTS = {
    **_twins(_matvec, "matvec"),
    **_twins(_gate_up, "gate_up"),
    **_twins(_down, "down"),
}

DOWN_PARTS = _twins(_down_parts, "down")
"""By the name of a `down`: the products of its experts by themselves, for `COMBINE`.

The words are those of `down`, but instead of `out` there are parts (count, 16 * row groups) f32,
of which the rows of experts without a record stay as they are.
"""

KNOWN_GATE_UPS = {
    twin: replace(twin, kinds=f"{twin.kinds}i")
    for name, twin in PRODUCTS.items()
    if name.endswith("_gate_up")
}
"""By the `gate_up`: one more word, 1 if no kernel writes the addresses of its experts."""

COMBINE = Twin("aiiiaaia", (Kernel("experts.cu", "combine", THREADS, _combined),))
"""The rest of a `down`: parts from anywhere, in the order and with the bits of the whole.

Words: parts (count, stride) f32, stride in floats, count, rows, weights, out, 1 to add to what
`out` holds, turns (count,) i64: the experts of turn 1 are added first, in their order, then those
of turn 2 and so on, as one `down` for each form of records does; 0: an expert is left out.
"""
