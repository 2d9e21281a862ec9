"""Downloads from the hub: planned first, resumed after any stop, and checked to the last byte.

huggingface_hub is asked for names, sizes and digests, and its cache is where the files go. Bytes
are fetched here, by ranges, because huggingface_hub throws unfinished files away when a download
is stopped, and compares sizes only. Its accelerator, hf-xet, does the same and is not used.
"""

import errno
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error
from localv4.library import hub
from localv4.library.digests import Digester, digest_file
from localv4.library.hub_cache import PART_SUFFIX
from localv4.library.model_files import model_type
from localv4.library.published import HubFile, Listing, Wanted, list_files, select
from localv4.library.remote import RemoteFile, open_remote
from localv4.library.stores import CacheStore, FolderStore, Store, size_of

DEFAULT_JOBS = 4
LOCK_POLL_S = 0.1
STOP_S = 1.0
SPARE_BYTES = 64 << 20
"""Left free on the disk for everybody else."""

OnNote = Callable[[str], None]
OnBytes = Callable[[int], None]


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download will do. Sizes are bytes."""

    wanted: Wanted
    listing: Listing
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    store: Store
    begun: dict[str, int]  # what earlier runs have left of missing files, by name
    free: int

    @property
    def total(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def needed(self) -> int:
        """What has to be fetched."""
        return sum(file.nbytes for file in self.missing) - sum(self.begun.values())

    def check_space(self) -> None:
        """Raise DoesNotFitError when the disk cannot take what is to be fetched."""
        if self.needed and self.needed + SPARE_BYTES > self.free:
            raise _no_space(self.store.base, self.needed, self.free)


def plan(
    wanted: Wanted,
    *,
    local_dir: Path | None = None,
    force: bool = False,
    on_note: OnNote = _ignore,
) -> Plan:
    """Ask the hub what is to be fetched, and look at what is here. Writes nothing.

    With `force` files that are here count as missing. Raises LocalV4Error.
    """
    listing = list_files(wanted.repo, wanted.revision, on_note)
    files = select(wanted, listing)
    store = (
        CacheStore(wanted.repo, listing.commit)
        if local_dir is None
        else FolderStore(local_dir.absolute(), wanted.repo, listing.commit)
    )
    missing = tuple(file for file in files if force or not store.has(file))
    begun = {file.name: min(size_of(store.part(file)) or 0, file.nbytes) for file in missing}
    return Plan(wanted, listing, files, missing, store, begun, free_bytes(store.base))


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, or will hold it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def download(
    task: Plan,
    *,
    jobs: int = DEFAULT_JOBS,
    on_bytes: OnBytes = _ignore,
    on_note: OnNote = _ignore,
) -> Path:
    """Carry out a plan and return the folder of the model.

    `on_bytes` is told what arrives (and, as negative numbers, what has to be fetched again);
    `on_note` what the user should know. Both are called from several threads. Raises
    DoesNotFitError, BadFileError and LocalV4Error; what has arrived by then is kept.
    """
    task.check_space()
    small = [file for file in task.missing if len(file.etag) < 64]
    large = [file for file in task.missing if len(file.etag) == 64]
    with _plain_errors(task.store.base, task.needed):
        _fetch_all(task, small, jobs, on_bytes, on_note)
        for file in task.files:
            if file not in task.missing:
                task.store.publish(file)
        _refuse_other_models(task)
        _fetch_all(task, large, jobs, on_bytes, on_note)
        absent = [file.name for file in task.files if size_of(task.store.path(file)) is None]
        if absent:
            raise LocalV4Error(
                f"{absent[0]} was removed meanwhile", hint=f"localv4 pull {task.wanted.name}"
            )
        task.store.finish(task.wanted.revision)
    return task.store.folder


def stream_shard(
    repo: str,
    revision: str,
    filename: str,
    folder: Path,
    *,
    on_bytes: OnBytes = _ignore,
    on_note: OnNote = _ignore,
) -> Path:
    """Fetch one file into a folder, checked, and return its path; the caller deletes it after use.

    A file that an earlier call has left there is used again, whole or in part. Raises
    LocalV4Error, BadFileError, and DoesNotFitError when the disk is full.
    """
    remote = open_remote(repo, filename, revision, on_note)
    target = folder / Path(filename).name
    part = target.with_name(f".{target.name}{PART_SUFFIX}")
    with _plain_errors(folder, remote.size):
        if size_of(target) == remote.size:
            digester = Digester(remote.etag, remote.size)
            digest_file(target, digester)
            if digester.matches():
                return target
        missing, free = remote.size - (size_of(part) or 0), free_bytes(folder)
        if missing + SPARE_BYTES > free:
            raise _no_space(folder, missing, free)
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_checked(remote, part, target, on_bytes, on_note)
    return target


def _no_space(folder: Path, missing: int, free: int) -> DoesNotFitError:
    needed = missing + SPARE_BYTES
    return DoesNotFitError(
        f"the disk of {folder} is too small: {needed / 2**30:.2f} GiB are needed, "
        f"{free / 2**30:.2f} GiB are free",
        hint="free some space, or choose another disk with --local-dir or HF_HUB_CACHE",
    )


@contextmanager
def _plain_errors(folder: Path, needed: int) -> Iterator[None]:
    """Give what the disk of a folder refuses its meaning."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(folder, needed, free_bytes(folder)) from error
        place = error.filename or folder
        raise LocalV4Error(f"cannot write {place}: {error.strerror or error}") from error


def _refuse_other_models(task: Plan) -> None:
    """Stop before the large files of a model that is of another architecture."""
    found = model_type(task.store.folder)
    if found is not None and found != "deepseek_v4":
        raise LocalV4Error(
            f"{task.wanted.repo} is no DeepSeek-V4 model: its config.json says {found!r}",
            hint=f"hf download {task.wanted.repo}, if you want it for another program",
        )


@dataclass(slots=True)
class _Crew:
    """Threads that fetch files from one queue; the first failure stops all of them."""

    files: "queue.SimpleQueue[HubFile]" = field(default_factory=queue.SimpleQueue)
    done: "queue.SimpleQueue[Exception | None]" = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self, fetch: Callable[[HubFile, threading.Event], None]) -> None:
        """Fetch files until none is left; report None, or the error that ended it."""
        failure = None
        try:
            while not self.stop.is_set():
                fetch(self.files.get_nowait(), self.stop)
        except queue.Empty:
            pass
        except Exception as error:
            failure = error
        self.done.put(failure)


def _fetch_all(
    task: Plan, files: list[HubFile], jobs: int, on_bytes: OnBytes, on_note: OnNote
) -> None:
    """Fetch files side by side. The threads end with the process: a Ctrl-C waits for none."""
    crew = _Crew()
    for file in files:
        crew.files.put(file)

    def fetch(file: HubFile, stop: threading.Event) -> None:
        _fetch_into(task, file, stop, on_bytes, on_note)

    threads = [
        threading.Thread(target=crew.work, args=(fetch,), daemon=True, name=f"localv4-pull-{n}")
        for n in range(min(jobs, len(files)))
    ]
    for thread in threads:
        thread.start()
    failure: Exception | None = None
    for _ in threads:
        failure = crew.done.get() or failure
        if failure is not None:
            break
    if failure is not None:
        crew.stop.set()
        for thread in threads:
            thread.join(STOP_S / len(threads))  # one that hears nothing from the hub is left behind
        raise failure


def _fetch_into(
    task: Plan, file: HubFile, stop: threading.Event, on_bytes: OnBytes, on_note: OnNote
) -> None:
    """Fetch one file into its place, unless another process has done so in the meantime."""
    store = task.store
    content, part, lock = store.content(file), store.part(file), store.lock(file)
    for path in (content, part, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    before = content.stat().st_mtime_ns if content.exists() else None
    with _locked(lock, file.name, stop, on_note):
        after = content.stat().st_mtime_ns if content.exists() else None
        begun = task.begun.get(file.name, 0)
        if after is not None and after != before:
            on_bytes(file.nbytes - begun)
        else:
            on_bytes((size_of(part) or 0) - begun)  # another process has gone on and was stopped
            remote = RemoteFile(
                task.wanted.repo,
                task.listing.commit,
                file.name,
                file.nbytes,
                file.etag,
                on_note,
                stop.wait,
            )
            digester = _fetch_checked(remote, part, content, on_bytes, on_note, stop)
            store.record.add(file.name, digester.entry())
        store.publish(file)


@contextmanager
def _locked(path: Path, name: str, stop: threading.Event, on_note: OnNote) -> Iterator[None]:
    """Hold the lock of a file; it dies with its owner, so a wait ends with that process at last."""
    with ExitStack() as held:
        has_told = False
        while True:
            try:
                held.enter_context(hub.WeakFileLock(path, timeout=LOCK_POLL_S))
                break
            except Timeout:
                if not has_told:
                    on_note(f"another process is fetching {name}; waiting for it")
                    has_told = True
            if stop.is_set():
                raise _Stopped
        yield


class _Stopped(LocalV4Error):
    """Another thread has failed; its error is the one that counts."""

    def __init__(self) -> None:
        super().__init__("stopped")


def _fetch_checked(
    remote: RemoteFile,
    part: Path,
    target: Path,
    on_bytes: OnBytes,
    on_note: OnNote,
    stop: threading.Event | None = None,
) -> Digester:
    """Fetch a file and give it its name when its digest is right; a damaged one is fetched again.

    Raises BadFileError when it is damaged twice.
    """
    for is_last in (False, True):
        digester = _fetch_part(remote, part, on_bytes, stop)
        if digester.matches():
            part.replace(target)
            return digester
        part.unlink()
        if not is_last:
            on_bytes(-remote.size)
            on_note(f"{remote.name} arrived damaged; fetching it once more")
    raise BadFileError(
        remote.name,
        f"its digest is not that which {hub.host()} lists, twice",
        hint="nothing of it was kept; try later, or another network",
    )


def _fetch_part(
    remote: RemoteFile, part: Path, on_bytes: OnBytes, stop: threading.Event | None
) -> Digester:
    """Complete the unfinished file and return its digest."""
    digester = Digester(remote.etag, remote.size)
    begun = size_of(part) or 0
    if begun > remote.size:
        part.unlink()
        begun = 0
    with part.open("ab", buffering=0) as file:
        if begun:
            digest_file(part, digester)
        for piece in remote.stream(begun):
            if stop is not None and stop.is_set():
                raise _Stopped
            _write_all(file.fileno(), piece)
            digester.update(piece)
            on_bytes(len(piece))
        os.fsync(file.fileno())
    return digester


def _write_all(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]
