"""A model on the hub as a source: its headers at once, its files when they are converted."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from localv4.cli import terminal

if TYPE_CHECKING:
    from quant.streamed_source import StreamedSource

MAX_SMALL_FILE_BYTES = 64 << 20


@contextmanager
def opened_on_hub(
    reference: str, scratch: Path | None, quiet: bool
) -> "Iterator[tuple[StreamedSource, str]]":
    """Open a published model; give it with the name that its forms have in the folder of models.

    Files are fetched into a hidden folder in `scratch` (None: the folder of models), which is
    removed at the end and kept when something fails, so that the next run goes on with it. Raises
    LocalV4Error when the hub cannot be asked.
    """
    from localv4 import paths
    from localv4.library.download import stream_shard
    from localv4.library.published import find_published
    from localv4.library.remote_headers import remote_headers
    from localv4.storage import open_checkpoint
    from quant.streamed_source import open_streamed

    def note(text: str) -> None:
        if not quiet:
            sys.stderr.write(terminal.sanitize_line(text) + "\n")

    wanted = find_published(reference)
    base_name = wanted.name.rpartition("/")[2]
    with ExitStack() as opened:
        remote = opened.enter_context(remote_headers(wanted, on_wait=note))
        _fetch_small_files(remote.repo, remote.commit, remote.path)
        folder = (scratch or paths.models_dir()) / f".{base_name}-{remote.commit[:12]}.source"

        def fetch(name: str) -> Path:
            if not (folder / name).exists():
                note(f"fetching {name}")
            return stream_shard(remote.repo, remote.commit, name, folder, on_note=note)

        checkpoint = opened.enter_context(open_checkpoint(remote.path))
        yield open_streamed(checkpoint, remote.repo, remote.commit, fetch), base_name
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def _fetch_small_files(repo: str, commit: str, folder: Path) -> None:
    """Put the tokenizer and the like beside the headers, where the model has them."""
    from localv4.library.published import list_files
    from localv4.library.remote import RemoteFile
    from quant.packer import SMALL_FILES

    for file in list_files(repo, commit).files:
        if file.name in SMALL_FILES and file.nbytes <= MAX_SMALL_FILE_BYTES:
            remote = RemoteFile(repo, commit, file.name, file.nbytes, file.etag)
            (folder / file.name).write_bytes(remote.read(0, file.nbytes))
