"""The one door to huggingface_hub: settings, requests, retries, and its errors in plain words.

Nothing else in localv4 opens a connection. Importing this module imports huggingface_hub, which
takes half a second; commands that need no model do not.
"""

import logging
import os
import socket
import ssl
import time
import warnings
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from localv4 import __version__
from localv4.errors import LocalV4Error, NotFoundError

with warnings.catch_warnings():
    # of HF_HUB_ENABLE_HF_TRANSFER, which has no effect any more: `pull` says so in its own words
    warnings.simplefilter("ignore", FutureWarning)
    from huggingface_hub import constants, errors, get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not declared
        WeakFileLock,
        build_hf_headers,
        hf_raise_for_status,
    )

__all__ = ["WeakFileLock", "constants", "errors", "get_session", "hf_raise_for_status"]

# httpx or its successor, whichever huggingface_hub was built on: the base of all request errors
HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__mro__[1]

# Seconds. Waits double up to the longest; an attempt that brings bytes starts the count anew.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
MAX_FAILURES = 7
MAX_FAILURES_AT_FIRST = 3  # before the hub has answered at all, nobody wants to wait for minutes
LONGEST_RETRY_AFTER_S = 300

_BUSY = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")
OnWait = Callable[[str], None]
Sleep = Callable[[float], object]

# No telemetry: without this, the name of the program that started us goes into every request.
constants.HF_HUB_DISABLE_TELEMETRY = True
# What goes wrong is told by us, once and in one line.
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def headers() -> dict[str, str]:
    """Return the headers of a request to the hub: who asks, and the user's token if there is one.

    They hold the token: they go to the hub only, and into no message.
    """
    found: dict[str, str] = build_hf_headers(library_name="localv4", library_version=__version__)
    # Compressed on the way, a file could be neither resumed nor measured.
    return found | {"Accept-Encoding": "identity"}


def has_token() -> bool:
    """Tell whether requests carry a token."""
    return "authorization" in headers()


def host() -> str:
    """Return the name of the hub that is asked."""
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE forbids every request."""
    return constants.is_offline_mode()


class Patience:
    """Waits longer after each failed attempt, and gives up with a clear error."""

    def __init__(
        self,
        repo: str,
        what: str,
        on_wait: OnWait | None = None,
        sleep: Sleep | None = None,
        *,
        is_first: bool = False,
    ) -> None:
        """`what` is fetched from `repo`; `on_wait` is told why a wait begins, and how long.

        `sleep` waits that many seconds; one that others can end must be given by the caller.
        `is_first` says that the hub has not been reached yet: a host that does not exist, or
        refuses connections, is not tried again then.
        """
        self._is_first = is_first
        self._repo = repo
        self._what = what
        self._on_wait = on_wait
        self._sleep = sleep or time.sleep
        self._failures = 0

    def progressed(self) -> None:
        """Note that something arrived: later failures start with short waits again."""
        self._failures = 0

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt; raise a LocalV4Error when there should be none."""
        plain = explain(error, self._repo, self._what)
        self._failures += 1
        most = MAX_FAILURES_AT_FIRST if self._is_first else MAX_FAILURES
        is_absent = self._is_first and _chain_has(error, (socket.gaierror, ConnectionRefusedError))
        if is_absent or not _may_pass(error) or self._failures > most:
            raise plain from error
        asked = _retry_after(error)
        if asked is not None and asked > LONGEST_RETRY_AFTER_S:
            raise plain from error
        doubled = FIRST_WAIT_S * 2 ** (self._failures - 1)
        seconds = asked if asked is not None else min(doubled, LONGEST_WAIT_S)
        if self._on_wait is not None:
            self._on_wait(f"{plain.message}; trying again in {seconds:.0f} s")
        self._sleep(seconds)


def is_request_error(error: BaseException) -> bool:
    """Tell whether a request failed, rather than our code."""
    if isinstance(error, RuntimeError):  # another thread has closed the shared connections
        return "closed" in str(error)
    return isinstance(error, (HTTP_ERROR, errors.OfflineModeIsEnabled, OSError))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error reports."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def explain(error: Exception, repo: str, what: str) -> LocalV4Error:
    """Return the error in one line of our own, with a hint; nothing of it comes from the server."""
    if isinstance(error, LocalV4Error):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return LocalV4Error(
            f"offline, and {what} is not here",
            hint="go online, or pull it where there is a network",
        )
    status = status_of(error)
    if status is not None:
        return _explain_status(error, status, repo, what)
    return _explain_connection(error, what)


def _explain_status(error: Exception, status: int, repo: str, what: str) -> LocalV4Error:
    page = f"{constants.ENDPOINT}/{repo}"
    login = "set HF_TOKEN, or: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return LocalV4Error(
            f"{repo} is gated: its terms must be accepted first",
            hint=f"accept them on {page}, then {login}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{repo} has no such revision ({what})", hint=f"{page}/commits/main")
    if status == 401 and has_token():
        return LocalV4Error(
            f"the hub does not accept your token (401, {repo})", hint=f"{login}, with a valid one"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return NotFoundError(
            f"no repository {repo}, or a private one ({status})",
            hint=f"check the name; for a private repository {login}",
        )
    if status == 403:
        return LocalV4Error(f"the hub refuses access to {what} of {repo} (403)", hint=login)
    if status == 404:
        return NotFoundError(f"{repo} has no {what} (404)", hint=page)
    if status == 429:
        seconds = _retry_after(error)
        later = f"try again in {seconds} s" if seconds else "try again later"
        return LocalV4Error(
            f"the hub limits how often it is asked (429, {what})",
            hint=later if has_token() else f"{later}; with a token the limit is higher: {login}",
        )
    if status >= 500:
        return LocalV4Error(
            f"the hub has a problem ({status}, {what})",
            hint="run the command again later; it goes on where it stopped",
        )
    return LocalV4Error(f"the hub refuses {what} of {repo} ({status})", hint=page)


def _explain_connection(error: Exception, what: str) -> LocalV4Error:
    again = "run the command again; it goes on where it stopped"
    if _chain_has(error, (ssl.SSLCertVerificationError,)):
        return LocalV4Error(
            f"the certificate of {host()} cannot be trusted",
            hint="check the clock; behind a company's proxy set SSL_CERT_FILE to its certificate",
        )
    if _chain_has(error, (socket.gaierror,)):
        return LocalV4Error(
            f"cannot find {host()} in the network", hint="check the connection, and HF_ENDPOINT"
        )
    if _chain_has(error, (ConnectionRefusedError,)):
        return LocalV4Error(
            f"{host()} refuses connections", hint="check HF_ENDPOINT and HTTPS_PROXY"
        )
    if "Timeout" in type(error).__name__:
        return LocalV4Error(f"{host()} does not answer ({what})", hint=again)
    return LocalV4Error(f"the connection to {host()} was lost ({what})", hint=again)


def _chain_has(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> bool:
    """Tell whether an error, or what led to it, is of one of the kinds."""
    for _ in range(16):  # chains may be cyclic
        if error is None or isinstance(error, kinds):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, kinds)


def _may_pass(error: Exception) -> bool:
    """Tell whether trying again can help."""
    if isinstance(error, (LocalV4Error, errors.OfflineModeIsEnabled)):
        return False
    status = status_of(error)
    if status is not None:
        return status in _BUSY
    return not _chain_has(error, (ssl.SSLCertVerificationError,))


def _retry_after(error: Exception) -> int | None:
    """Return the seconds that the server asks to wait."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return int(value) if value.isascii() and value.isdigit() and len(value) < 7 else None


def ask(request: Callable[[], T], repo: str, what: str, on_wait: OnWait | None = None) -> T:
    """Return what a request returns; it is made again while that can help.

    Raises LocalV4Error in place of every error of the network or the hub.
    """
    patience = Patience(repo, what, on_wait, is_first=True)
    while True:
        try:
            return request()
        except Exception as error:
            if not is_request_error(error):
                raise
            patience.wait(error)


def ignored_settings() -> str | None:
    """Return a note on settings of the user that have no effect here."""
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_ENABLE_HF_TRANSFER has no effect: huggingface_hub dropped it"
    return None
