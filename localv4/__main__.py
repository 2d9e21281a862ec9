"""The `localv4` command, also as `python -m localv4`."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

_code = 1


def main() -> NoReturn:
    """Run the command line; Ctrl-C is quiet from the first import on.

    Once everything is cleaned up the process ends: Python would take compiled code apart piece by
    piece, for up to a second.
    """
    global _code
    atexit.register(_end)  # the first one is called last
    try:
        from localv4.cli.main import main as run

        run()
    except KeyboardInterrupt:
        _code = 130
        sys.exit(130)
    except SystemExit as wish:
        _code = wish.code if isinstance(wish.code, int) else 1
        raise


def _end() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(_code)


if __name__ == "__main__":
    main()
