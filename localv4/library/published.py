"""What the hub publishes: which repository a reference means, and which of its files are wanted."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from huggingface_hub import HfApi, ModelInfo

from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library import hub
from localv4.library.installed import EMBEDDED_NAME
from localv4.library.model_files import GGUF_PART, is_companion, quant_label
from localv4.library.registry import REPO_PATTERN, ModelSpec, Registry, load_registry
from localv4.storage.names import MAX_FILE_NAME_BYTES, quoted

HUB_PREFIX = "hf://"
MAX_LISTED_FILES = 100_000
MAX_FILE_BYTES = 1 << 50

# Whatever a pattern says: nothing else is ever fetched, no program and no pickle.
_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".md", ".txt")
_TEXTS = re.compile(r"(?:LICENSE|NOTICE)[\w.-]*", re.ASCII)

_REVISION = re.compile(r"[A-Za-z0-9_](?:[\w./-]{0,200}[A-Za-z0-9_])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# No part of a path may hold these, be one of Windows' devices, or end so that Windows cuts it.
_HOSTILE = re.compile(r"[\x00-\x1f\x7f\\:]")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?|.*[. ]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; `etag` is its SHA-256, or git's SHA-1 of a small one."""

    name: str
    nbytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a repository at one commit. Every name is known to be harmless."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reference asks the hub for."""

    name: str  # that the model will have here
    repo: str
    revision: str
    spec: ModelSpec | None
    quant: str = ""


def find_published(reference: str, revision: str | None = None) -> Wanted:
    """Return what `name[:quant]`, an alias or `hf://org/repo[:quant]` stands for on the hub.

    `revision` wins over the pinned one. Raises NotFoundError for an unknown name, UsageError for
    one that is incomplete or no name at all.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{quoted(revision)} is no revision", hint="name a commit, branch or tag")
    registry = load_registry()
    if reference.startswith(HUB_PREFIX):
        return _from_hub(reference.removeprefix(HUB_PREFIX), revision, registry)
    base, _, quant = reference.partition(":")
    name = registry.find(base)
    if base.lower() == EMBEDDED_NAME:
        raise UsageError(f"{EMBEDDED_NAME} is built in: it is here already")
    if name is None:
        raise _unknown(reference, registry)
    spec = registry.models[name]
    if spec.quants:
        labels = {label.lower(): label for label in spec.quants}
        if quant.lower() not in labels:
            problem = f"{base} has no form {quant}" if quant else f"{base} comes in several forms"
            choices = ", ".join(f"{base}:{label}" for label in spec.quants)
            raise UsageError(problem, hint=f"choose one: {choices}")
        quant = labels[quant.lower()]
    elif quant:
        raise UsageError(
            f"{base} is published in one form only", hint=f"localv4 pull {base}, then quantize it"
        )
    label = f"{base}:{quant}" if quant else base
    return Wanted(label, spec.repo, revision or spec.revision or "main", spec, quant)


def _from_hub(reference: str, revision: str | None, registry: Registry) -> Wanted:
    repo, _, quant = reference.partition(":")
    if not re.fullmatch(REPO_PATTERN, repo) or ".." in repo or len(repo) > 160:
        raise UsageError(f"{quoted(HUB_PREFIX + reference)} is no repository: write hf://org/repo")
    pinned = {spec.revision for _, spec in registry.of_repo(repo)}
    default = pinned.pop() if len(pinned) == 1 else None
    name = HUB_PREFIX + reference
    return Wanted(name, repo, revision or default or "main", None, quant)


def _unknown(reference: str, registry: Registry) -> LocalV4Error:
    if "/" in reference:
        return UsageError(
            f"{quoted(reference)} is no name of a model", hint=f"localv4 pull hf://{reference}"
        )
    nearest = registry.suggest(reference.partition(":")[0])
    hint = f"did you mean {nearest}" if nearest else "localv4 list --all shows what is known"
    return NotFoundError(f"no model is called {quoted(reference)}", hint=hint)


def list_files(repo: str, revision: str, on_wait: hub.OnWait | None = None) -> Listing:
    """Ask the hub for a commit and its files.

    Raises LocalV4Error when it does not answer, BadFileError when a name in the answer could lead
    out of a folder.
    """
    api = HfApi(headers=hub.headers())

    def request() -> ModelInfo:
        timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)

    try:
        found = hub.ask(request, repo, f"revision {revision[:12]}", on_wait)
        files = [
            HubFile(
                item.rfilename,
                item.lfs.size if item.lfs else item.size or 0,
                (item.lfs.sha256 if item.lfs else item.blob_id) or "",
            )
            for item in found.siblings or ()
        ]
        if len(files) > MAX_LISTED_FILES or not _COMMIT.fullmatch(found.sha or ""):
            raise ValueError("no commit, or too many files")
        for file in files:
            _check(file, repo)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LocalV4Error(
            f"{hub.host()} does not answer as a hub does ({repo})", hint="check HF_ENDPOINT"
        ) from error
    return Listing(repo, str(found.sha), tuple(sorted(files, key=lambda file: file.name)))


def _check(file: HubFile, repo: str) -> None:
    """Raise BadFileError for a name that is a trap, ValueError for nonsense in other fields."""
    parts = file.name.split("/")
    long = any(len(part.encode("utf-8", "surrogatepass")) > MAX_FILE_NAME_BYTES for part in parts)
    if (
        long
        or len(parts) > 16
        or any(part in ("", ".", "..") for part in parts)
        or any(_HOSTILE.search(part) or _DEVICE.fullmatch(part) for part in parts)
    ):
        raise BadFileError(
            repo,
            f"it lists the file name {quoted(file.name)}",
            hint="nothing was downloaded; do not trust this repository",
        )
    if type(file.nbytes) is not int or not 0 <= file.nbytes < MAX_FILE_BYTES:
        raise ValueError("a size")
    if not _DIGEST.fullmatch(file.etag):
        raise ValueError("a digest")


def select(wanted: Wanted, listing: Listing) -> tuple[HubFile, ...]:
    """Return the files to fetch. Raises NotFoundError for none, UsageError for several models."""
    allowed = [file for file in listing.files if _may_be_fetched(file.name)]
    if wanted.spec is None:
        chosen = _choose_form(wanted, allowed)
    else:
        quant = wanted.spec.quants.get(wanted.quant)
        patterns = (quant.files,) if quant else wanted.spec.allow
        chosen = [file for file in allowed if any(fnmatchcase(file.name, p) for p in patterns)]
    if not any(file.name.endswith((".safetensors", ".gguf")) for file in chosen):
        raise NotFoundError(
            f"{wanted.repo} has no weights of {wanted.name} at {listing.commit[:12]}",
            hint=f"{hub.constants.ENDPOINT}/{wanted.repo}/tree/{listing.commit}",
        )
    return tuple(chosen)


def _may_be_fetched(name: str) -> bool:
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    return path.suffix in _SUFFIXES or _TEXTS.fullmatch(path.name) is not None


def _choose_form(wanted: Wanted, files: list[HubFile]) -> list[HubFile]:
    """Choose among the forms in a repository that the registry does not know."""
    if not wanted.quant and any(file.name.endswith(".safetensors") for file in files):
        kept = (".safetensors", ".json")
        return [file for file in files if file.name.endswith(kept) or file.name == "metadata.gguf"]
    forms = _gguf_forms(files)
    labels = {label.lower(): label for label in forms}
    if wanted.quant.lower() in labels:
        return forms[labels[wanted.quant.lower()]]
    if not wanted.quant and len(forms) == 1:
        return next(iter(forms.values()))
    if not forms:
        return []
    base = HUB_PREFIX + wanted.repo
    problem = f"has no form {wanted.quant}" if wanted.quant else "comes in several forms"
    choices = ", ".join(f"{base}:{label}" for label in sorted(forms))
    raise UsageError(f"{base} {problem}", hint=f"choose one: {choices}")


def _gguf_forms(files: list[HubFile]) -> dict[str, list[HubFile]]:
    """Group GGUF files by quantization; where two models share one, by their own names."""
    stems: dict[str, list[HubFile]] = defaultdict(list)
    for file in files:
        path = PurePosixPath(file.name)
        if path.suffix == ".gguf" and not is_companion(path.name):
            part = GGUF_PART.match(path.name)
            stems[part["stem"] if part else path.stem].append(file)
    times = Counter(map(quant_label, stems))
    return {
        (label if times[label := quant_label(stem)] == 1 else stem): parts
        for stem, parts in stems.items()
    }
