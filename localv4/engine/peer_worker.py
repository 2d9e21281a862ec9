"""The process that runs llama.cpp beside us, by the package llama-cpp-python.

It is started by its path, by whichever interpreter has that package, and imports nothing of
localv4. A request is a line of JSON on stdin, its answer a line of JSON on stdout:

  {"do": "hello"}    which version of llama.cpp this is
  {"do": "load"}     read the model at "path"; "threads", "batch", "ubatch", "flash", "repack"
  {"do": "open"}     make a context for a test; "kind" pp or tg, "depth", "tokens" of depth and test
  {"do": "prepare"}  bring the context to the depth of the test
  {"do": "run"}      run the test once and tell the seconds; "logits": those of the last token too

An answer with the key "error" tells in one line what went wrong. The process ends with its stdin.
"""

from __future__ import annotations

import base64
import collections
import ctypes
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

PROGRAM_FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
FLASH = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
WARNING, CONTINUED = 3, 5  # enum ggml_log_level
KEPT_LINES = 5


class Failed(Exception):
    """llama.cpp refused something; the message is one line."""


class Log:
    """What llama.cpp says: the last warnings and errors, and its choice of attention."""

    def __init__(self) -> None:
        self.problems: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self.flash = ""
        self._was_problem = False

    def take(self, level: int, text: str) -> None:
        """Take in a piece of the log; a line may come in several."""
        if level != CONTINUED:
            self._was_problem = level >= WARNING
        line = " ".join(text.split())
        if self._was_problem and line:
            self.problems.append(line)
        # "sched_reserve: Flash Attention enabled" where it was left to the library
        words = line.lower()
        if "flash attention" in words and words.endswith(("enabled", "disabled")):
            self.flash = words.rsplit(" ", 1)[1]

    def last_problem(self) -> str:
        """Return the most recent complaint, with its colon, or nothing."""
        return f": {self.problems[-1]}" if self.problems else ""


class Tokens:
    """The tokens of one sequence in the form that `llama_decode` wants."""

    def __init__(self, llama: Any, ids: list[int]) -> None:
        count = len(ids)
        self._llama = llama
        self.ids = (ctypes.c_int32 * count)(*ids)
        self.positions = (ctypes.c_int32 * count)(*range(count))
        self.sequences = (ctypes.c_int32 * count)(*[1] * count)
        self._sequence = (ctypes.c_int32 * 1)(0)
        pointer = ctypes.POINTER(ctypes.c_int32)
        self.sequence = (pointer * count)(*[ctypes.cast(self._sequence, pointer)] * count)
        self.logits = (ctypes.c_int8 * count)()

    def batch(self, first: int, count: int) -> Any:
        """Return `count` tokens from `first` on, without a copy."""
        return self._llama.llama_batch(
            n_tokens=count,
            token=_at(self.ids, first),
            pos=_at(self.positions, first),
            n_seq_id=_at(self.sequences, first),
            seq_id=_at(self.sequence, first),
            logits=_at(self.logits, first),
        )


def _at(array: Any, index: int) -> Any:
    """Return a pointer to an element of a ctypes array."""
    kind = array._type_
    place = ctypes.byref(array, index * ctypes.sizeof(kind))
    return ctypes.cast(place, ctypes.POINTER(kind))


class Worker:
    """One model of llama.cpp, and the context of the test at hand."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        self.log = Log()
        self.model: Any = None
        self.context: Any = None
        self.saved: Any = None  # the context's state at the depth of the test
        # the library keeps a pointer to it
        self._logs = llama.llama_log_callback(self._take_log)
        llama.llama_log_set(self._logs, ctypes.c_void_p(0))
        llama.llama_backend_init()

    def _take_log(self, level: int, text: bytes, _user: Any) -> None:
        self.log.take(level, text.decode("utf-8", "replace"))

    def hello(self) -> dict[str, Any]:
        """Tell what runs here."""
        package = importlib.import_module("llama_cpp")
        return {
            "version": str(package.__version__),
            "ggml": self._ggml_version(),
            "system": self.llama.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
            "python": sys.version.split()[0],
        }

    def _ggml_version(self) -> str | None:
        try:
            function = importlib.import_module("llama_cpp._ggml").libggml.ggml_version
        except (ImportError, AttributeError):
            return None
        function.restype = ctypes.c_char_p
        return str(function().decode("utf-8", "replace"))

    def load(
        self, path: str, threads: int, batch: int, ubatch: int, flash: str, repack: bool
    ) -> dict[str, Any]:
        """Read a model into memory; everything stays on the processor."""
        start = time.perf_counter()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = 0
        _set(params, "use_extra_bufts", repack)
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise Failed("it cannot load the model" + self.log.last_problem())
        self.threads, self.batch, self.ubatch, self.flash = threads, batch, ubatch, flash
        text = ctypes.create_string_buffer(256)
        self.llama.llama_model_desc(self.model, text, len(text))
        vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.vocab_size = int(self.llama.llama_vocab_n_tokens(vocabulary))
        return {
            "seconds": time.perf_counter() - start,
            "description": text.value.decode("utf-8", "replace"),
            "bytes": int(self.llama.llama_model_size(self.model)),
            "vocab_size": self.vocab_size,
        }

    def open(self, kind: str, depth: int, tokens: list[int]) -> dict[str, Any]:
        """Make a context that holds just the test, as llama-bench does."""
        if self.context:
            self.llama.llama_free(self.context)
        self.saved = None
        params = self.llama.llama_context_default_params()
        params.n_ctx = len(tokens)
        params.n_batch = self.batch
        params.n_ubatch = min(self.ubatch, self.batch)
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH[self.flash]
        params.offload_kqv = False
        _set(params, "op_offload", False)
        _set(params, "swa_full", False)
        self.log.flash = ""
        self.context = self.llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise Failed("it cannot make a context" + self.log.last_problem())
        self.kind, self.depth, self.count = kind, depth, len(tokens)
        self.tokens = Tokens(self.llama, tokens)
        wanted = range(depth, self.count) if kind == "tg" else (self.count - 1,)
        for index in wanted:
            self.tokens.logits[index] = 1
        return {
            "n_ctx": int(self.llama.llama_n_ctx(self.context)),
            "n_batch": int(self.llama.llama_n_batch(self.context)),
            "n_ubatch": int(self.llama.llama_n_ubatch(self.context)),
            "flash_attention": self.flash + (f" ({self.log.flash})" if self.log.flash else ""),
        }

    def prepare(self) -> dict[str, Any]:
        """Empty the context and fill it up to the depth: from what was kept, or token by token."""
        llama = self.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)
        if self.depth == 0 or self._restore():
            return {}
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)
        self._read(0, self.depth)
        size = llama.llama_state_seq_get_size(self.context, 0)
        self.saved = (ctypes.c_uint8 * size)()
        if llama.llama_state_seq_get_data(self.context, self.saved, size, 0) == 0:
            self.saved = None
        return {}

    def _restore(self) -> bool:
        if self.saved is None:
            return False
        size = len(self.saved)
        return bool(self.llama.llama_state_seq_set_data(self.context, self.saved, size, 0))

    def run(self, logits: bool) -> dict[str, Any]:
        """Run the test; `logits`: send those of the last token along, as little-endian f32."""
        start = time.perf_counter()
        if self.kind == "pp":
            self._read(self.depth, self.count)
        else:
            for index in range(self.depth, self.count):
                self._decode(index, 1)
        seconds = time.perf_counter() - start
        answer: dict[str, Any] = {"seconds": seconds, "peak_rss_bytes": _peak_bytes()}
        if logits:
            values = self.llama.llama_get_logits_ith(self.context, -1)
            raw = ctypes.string_at(values, 4 * self.vocab_size)
            answer["logits"] = base64.b64encode(raw).decode("ascii")
        return answer

    def _read(self, first: int, end: int) -> None:
        for start in range(first, end, self.batch):
            self._decode(start, min(self.batch, end - start))

    def _decode(self, first: int, count: int) -> None:
        code = self.llama.llama_decode(self.context, self.tokens.batch(first, count))
        self.llama.llama_synchronize(self.context)
        if code != 0:
            raise Failed(f"llama_decode returned {code}" + self.log.last_problem())


def _set(params: Any, name: str, value: Any) -> None:
    """Set what not every version of the library has."""
    if hasattr(params, name):
        setattr(params, name, value)


def _peak_bytes() -> int | None:
    """Return the most memory that this process has held, mapped pages included, on Linux."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            peaks = [line.split()[1] for line in file if line.startswith("VmHWM:")]
    except OSError:
        return None
    return int(peaks[0]) * 1024 if peaks else None


def _requests() -> queue.SimpleQueue[str]:
    """Return the lines of stdin, which are read on a thread: its end ends the process at once."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # even in the middle of a test: nobody waits for its result any more

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    # the folder of this file is no place to import from: its modules have common names
    sys.path[:] = [entry for entry in sys.path if entry != PROGRAM_FOLDER]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints must not come between the answers
    lines = _requests()
    worker: Worker | None = None
    while True:
        request = json.loads(lines.get())
        name = request.pop("do")
        answer: dict[str, Any]
        try:
            if worker is None:
                worker = Worker(importlib.import_module("llama_cpp").llama_cpp)
            answer = getattr(worker, name)(**request)
        except Exception as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
            if isinstance(error, ImportError) and error.name == "llama_cpp":
                answer["missing"] = True
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
