"""Real processes for the tests of the command line: through pipes, and on a pseudo-terminal."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import mock

import pytest

from localv4.cli.main import main

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "localv4"]

# Generous: the first process of a test run may have to compile the kernels.
TIMEOUT_S = 300

ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][0-9A-B]|[=>78])")

# Editors ask a terminal where its cursor is, and show a status line only when it answers.
CURSOR_QUESTION = b"\x1b[6n"

needs_jit = pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT", "0") != "0", reason="too slow without compiled kernels"
)
LAPTOP = ("--assume-ram", "64GiB", "--assume-bandwidth", "90GB/s", "--assume-disk", "7GB/s")
"""A machine that somebody describes to `localv4 fit`."""

needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")


def environment(home: Path, changes: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment without settings, models and history of whoever runs the tests."""
    dropped = ("LOCALV4_", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "LOCALV4_HOME": str(home / "data"),
        "LOCALV4_NOHISTORY": "1",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_CACHE": str(home / "hf" / "hub"),
        "TERM": "xterm-256color",
        **(changes or {}),
    }


def run_localv4(
    *arguments: str, home: Path, stdin: bytes = b"", changes: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command with pipes on all three streams."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=environment(home, changes),
        timeout=TIMEOUT_S,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command wrote, and its exit code."""

    code: int
    stdout: str
    stderr: str


def run_here(
    *arguments: str, home: Path, stdin: str = "", changes: dict[str, str] | None = None
) -> Ended:
    """Run the command in this process: quicker, for what needs no streams of its own."""
    before = signal.getsignal(signal.SIGTERM)
    out_bytes, err_bytes = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(out_bytes, encoding="utf-8")
    err = io.TextIOWrapper(err_bytes, encoding="utf-8")
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    with (
        mock.patch.dict(os.environ, environment(home, changes), clear=True),
        mock.patch.multiple(sys, argv=["localv4", *arguments], stdin=given, stdout=out, stderr=err),
        pytest.raises(SystemExit) as caught,
    ):
        main()
    signal.signal(signal.SIGTERM, before)
    code = caught.value.code
    assert isinstance(code, int)
    err.flush()
    return Ended(code, out_bytes.getvalue().decode(), err_bytes.getvalue().decode())


def start_localv4(
    *arguments: str, home: Path, stdout: int = subprocess.PIPE
) -> "subprocess.Popen[bytes]":
    """Start the command with an empty stdin and pipes to read from."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(home),
    )


class Terminal:
    """A process on a pseudo-terminal of its own; what it writes is collected as text."""

    def __init__(
        self,
        *arguments: str,
        home: Path,
        columns: int = 80,
        rows: int = 24,
        changes: dict[str, str] | None = None,
    ) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.written = ""
        self.exit_code: int | None = None
        self._seen = 0
        with warnings.catch_warnings():
            # of other threads, which are no harm: the child becomes another program at once
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            command = [*COMMAND, *arguments]
            os.execvpe(command[0], command, environment(home, changes))
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.exit_code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    @property
    def text(self) -> str:
        """Everything written so far, without escape sequences."""
        return ESCAPE.sub("", self.written)

    def send(self, text: str) -> None:
        """Type `text`."""
        os.write(self._fd, text.encode())

    def kill(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self._pid, number)

    def echoes(self) -> bool:
        """Say whether the terminal is in its usual mode: it shows what is typed, by lines."""
        import termios

        modes = termios.tcgetattr(self._fd)[3]
        return bool(modes & termios.ECHO) and bool(modes & termios.ICANON)

    def wait_for(self, text: str, timeout_s: float = TIMEOUT_S) -> str:
        """Wait until `text` appears after what was waited for before; return what came with it."""
        deadline = time.monotonic() + timeout_s
        while (at := self.text.find(text, self._seen)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"no {text!r} in {self.text[self._seen :]!r}")
        start, self._seen = self._seen, at + len(text)
        return self.text[start : self._seen]

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the end of the process and return its exit code, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                return self.exit_code
            time.sleep(0.01)
        raise AssertionError(f"still running: {self.text!r}")

    def _read(self, deadline: float) -> bool:
        """Collect what the process wrote next; False at its end or after the deadline."""
        import select

        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.written += data.decode("utf-8", "replace")
        for _ in range(data.count(CURSOR_QUESTION)):
            self.send("\x1b[1;1R")
        return bool(data)
