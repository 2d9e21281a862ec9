"""llama.cpp as another engine to compare with, in a process of its own.

That process is `peer_worker.py`; what it understands is written there. It may crash without harm,
and it ends when this process does, because its stdin ends then.
"""

import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from localv4.errors import Cancelled, LocalV4Error, NotFoundError
from localv4.model.matrix import F32, Floats

WORKER = Path(__file__).with_name("peer_worker.py")

WAIT_S = 0.1
END_S = 5.0
"""A process that was told to end is killed after this time."""

MAX_ANSWER_BYTES = 64 << 20  # the logits of a million tokens, and more
MAX_LINES, MAX_LINE_BYTES = 20, 400  # kept of what the process writes to stderr

FlashAttention = Literal["auto", "on", "off"]

Answer = dict[str, Any]


class PeerError(LocalV4Error):
    """llama.cpp crashed or refused; the message is one line that begins with its name."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What llama.cpp can be told; the defaults are those of llama-bench.

    `ubatch`: tokens of a prompt in one pass. `repack`: keep weights in the layouts of its fast
    kernels, in memory of its own, and not as they are mapped from the file.
    """

    ubatch: int = 512
    flash_attention: FlashAttention = "auto"
    repack: bool = True

    @property
    def batch(self) -> int:
        """Tokens that are handed over in one call."""
        return max(2048, self.ubatch)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What a reader of the figures must know of the other engine."""

    package: str
    """Version of llama-cpp-python."""
    ggml: str | None
    system: str
    """Instruction sets and libraries of the build, in its own words."""
    python: str


@dataclass(frozen=True, slots=True)
class PeerContext:
    """What llama.cpp chose for a test."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    flash_attention: str


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One run of a test; `peak_bytes` is the most memory its process has held, if it knows."""

    seconds: float
    peak_bytes: int | None
    logits: Floats | None


def worker_command(python: Path | None) -> list[str]:
    """Return how to start the worker; `python` is an interpreter that has llama-cpp-python."""
    return [str(python or sys.executable), str(WORKER)]


class Peer:
    """One worker process at a time; it is started when it is needed and again after a crash.

    Every method raises PeerError when llama.cpp fails and Cancelled when the event is set.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: PeerSettings,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.settings = settings
        self._command = list(command)
        self._cancelled = cancelled or threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=MAX_LINES)
        self._readers: list[threading.Thread] = []

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def hello(self) -> PeerFacts:
        """Start the worker if there is none; raise NotFoundError if it has no llama-cpp-python."""
        answer = self._ask("hello")
        return PeerFacts(
            package=str(answer["version"]),
            ggml=answer["ggml"],
            system=str(answer["system"]),
            python=str(answer["python"]),
        )

    def load(self, path: Path, threads: int) -> None:
        """Read a GGUF file, of a split model the first one."""
        self._ask(
            "load",
            path=str(path),
            threads=threads,
            batch=self.settings.batch,
            ubatch=self.settings.ubatch,
            flash=self.settings.flash_attention,
            repack=self.settings.repack,
        )

    def open(self, kind: Literal["pp", "tg"], depth: int, tokens: Sequence[int]) -> PeerContext:
        """Make a context for a test with those tokens, `depth` of which come before it."""
        answer = self._ask("open", kind=kind, depth=depth, tokens=list(tokens))
        return PeerContext(
            n_ctx=int(answer["n_ctx"]),
            n_batch=int(answer["n_batch"]),
            n_ubatch=int(answer["n_ubatch"]),
            flash_attention=str(answer["flash_attention"]),
        )

    def prepare(self) -> None:
        """Bring the context to the depth of the test."""
        self._ask("prepare")

    def run(self, *, logits: bool = False) -> PeerRun:
        """Run the test once; `logits`: return those of the last token."""
        answer = self._ask("run", logits=logits)
        raw = answer.get("logits")
        values = None if raw is None else np.frombuffer(base64.b64decode(raw), "<f4").astype(F32)
        return PeerRun(float(answer["seconds"]), answer["peak_rss_bytes"], values)

    def close(self) -> None:
        """End the worker and with it all that it holds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for thread in self._readers:
            thread.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            with suppress(OSError):  # what was not yet written to a dead process
                stream.close()

    def _start(self) -> "subprocess.Popen[str]":
        try:
            process = subprocess.Popen(  # noqa: S603 - the interpreter that the user named, or ours
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # it would start a debugger
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise NotFoundError(f"cannot start {self._command[0]}: {reason}") from error
        self._answers = queue.SimpleQueue()
        self._said.clear()
        self._readers = [
            threading.Thread(target=_read_answers, args=(process.stdout, self._answers)),
            threading.Thread(target=_read_lines, args=(process.stderr, self._said)),
        ]
        for thread in self._readers:
            thread.daemon = True
            thread.start()
        self._process = process
        return process

    def _ask(self, name: str, **values: Any) -> Answer:
        """Send a request and wait for its answer."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"do": name, **values}) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._crash(process) from None
        while not self._cancelled.is_set():
            try:
                line = self._answers.get(timeout=WAIT_S)
            except queue.Empty:
                continue
            if line is None:
                raise self._crash(process)
            return self._checked(line)
        self.close()
        raise Cancelled("stopped")

    def _checked(self, line: str) -> Answer:
        """Return an answer that is no error."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise PeerError(f"llama.cpp: its process answered {line[:80]!r}")
        if answer.get("missing"):
            self.close()
            raise NotFoundError(
                f"{self._command[0]} has no llama-cpp-python",
                hint="pip install 'localv4[compare]', or --peer-python with another environment",
            )
        if "error" in answer:
            raise PeerError(f"llama.cpp: {answer['error']}")
        return answer

    def _crash(self, process: "subprocess.Popen[str]") -> LocalV4Error:
        """Return what to raise when the worker has ended by itself."""
        if self._cancelled.is_set():  # Ctrl-C reaches all processes of a terminal
            self.close()
            return Cancelled("stopped")
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        how = _ending(process.poll())
        self.close()
        words = _reason(list(self._said))
        return PeerError(f"llama.cpp crashed ({how})" + (f": {words}" if words else ""))


def _read_answers(stream: IO[str], answers: "queue.SimpleQueue[str | None]") -> None:
    """Put each line of a stream into a queue, and None at its end."""
    while line := stream.readline(MAX_ANSWER_BYTES):
        answers.put(line)
    answers.put(None)


def _read_lines(stream: IO[str], lines: "deque[str]") -> None:
    """Keep the last lines of a stream."""
    while line := stream.readline(MAX_LINE_BYTES):
        lines.append(" ".join(line.split()))


def _ending(code: int | None) -> str:
    """Tell how a process ended, from its exit code."""
    if code is None:
        return "it closed its output"
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _reason(lines: Sequence[str]) -> str:
    """Return the line of a dead process that says most: a failed assertion, else the last one."""
    asserted = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line]
    return next(iter([*asserted, *(line for line in reversed(lines) if line)]), "")
