"""The exceptions that a user may see, each with the exit code of the process it ends."""

from pathlib import Path


class LocalV4Error(Exception):
    """A failure with a one-line message and, where there is one, a remedy to type.

    `exit_code` is what the process returns when nothing handles the error: 1 failed, 2 wrong usage,
    4 does not fit, 5 a file is damaged or not trusted.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LocalV4Error):
    """The command line or an argument makes no sense."""

    exit_code = 2


class NotFoundError(LocalV4Error):
    """A model or file that was named does not exist here."""


class DoesNotFitError(LocalV4Error):
    """The request needs more memory, disk or context than there is."""

    exit_code = 4


class BadFileError(LocalV4Error):
    """A file is damaged, unsupported or not trusted."""

    exit_code = 5

    def __init__(self, path: Path | str, detail: str, *, hint: str | None = None) -> None:
        super().__init__(f"bad file ({path}: {detail})", hint=hint)
        self.path = Path(path)
        self.detail = detail


class NumericsError(LocalV4Error):
    """The engine produced a NaN or an infinity where a number was due."""


class Cancelled(LocalV4Error):
    """The user stopped the work."""

    exit_code = 130
