"""The windows of a text: pieces that a model reads each by itself, as llama.cpp cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.errors import DoesNotFitError, UsageError


@dataclass(frozen=True, slots=True)
class Windows:
    """Tokens (windows, size) as the text has them, and which predictions count.

    The logits at positions `first` to size - 2 count: they predict the tokens after them. `bos`
    takes the place of each window's first token, unless it is None.
    """

    tokens: NDArray[np.int32]
    first: int
    bos: int | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    @property
    def counted(self) -> int:
        """Predictions of a window that count."""
        return self.size - 1 - self.first

    def inputs(self, index: int) -> list[int]:
        """Return what the model reads of a window: all but the last token, which none follows."""
        ids: list[int] = self.tokens[index, :-1].tolist()
        if self.bos is not None:
            ids[0] = self.bos
        return ids

    def targets(self, index: int) -> NDArray[np.int32]:
        """Return the tokens (size - 1,) that follow each position of a window."""
        following: NDArray[np.int32] = self.tokens[index, 1:]
        return following


def cut(
    ids: Sequence[int],
    size: int,
    *,
    bos: int | None,
    stride: int | None = None,
    most: int | None = None,
) -> Windows:
    """Cut a text into windows of `size` tokens, at most `most` of them; a rest is dropped.

    Without a stride windows lie side by side and the second half of each counts, so that every
    prediction sees size / 2 tokens or more. With one, a window begins every `stride` tokens, and
    its last `stride` predictions count. A `bos` comes before the text, too, as in llama.cpp.
    Raises UsageError for sizes without sense, DoesNotFitError for a text shorter than a window.
    """
    if size < 2:
        raise UsageError(f"a window of {size} tokens predicts nothing", hint="use -c 2 or more")
    if stride is not None and not 0 < stride < size:
        raise UsageError(f"--stride is {stride}, expected 1 to {size - 1} in windows of {size}")
    stream = np.asarray(ids if bos is None else [bos, *ids], np.int32)
    if len(stream) < size:
        raise DoesNotFitError(
            f"the text has {len(stream)} tokens, a window {size}",
            hint="give a longer text, or smaller windows with -c",
        )
    every = np.lib.stride_tricks.sliding_window_view(stream, size)[:: stride or size][:most]
    return Windows(every, size // 2 if stride is None else size - 1 - stride, bos)
