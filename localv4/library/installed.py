"""The models on this machine, and the one that a reference such as `v4-flash:q4` means."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from localv4 import paths
from localv4.errors import BadFileError, LocalV4Error, NotFoundError, UsageError
from localv4.library import hub_cache
from localv4.library.model_files import WeightSet, find_weight_sets, gguf_set_of
from localv4.library.registry import ModelSpec, Registry, Release, load_registry

EMBEDDED_NAME = "tiny-v4"
SUMMER_RELEASES = ("0731", "0813")
"""Marks in the names of models whose prompts have the texts of the July release."""

_HUB_PREFIX = "hf://"


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model whose files are here. `problem` tells why it cannot be used, None when it can."""

    name: str  # as the user may type it, with ":quant" where there are several
    path: Path  # what to open: a folder or a GGUF file
    source: Literal["embedded", "home", "hub-cache", "path"]
    format: str  # "safetensors", "gguf" or "packed"
    nbytes: int  # of the weight files
    spec: ModelSpec | None  # what the registry knows of it
    quant: str = ""  # the quantization's name, "" for weights as they were published
    problem: str | None = None

    @property
    def base_name(self) -> str:
        """The name without the quantization."""
        return self.name.removesuffix(f":{self.quant}") if self.quant else self.name

    @property
    def release(self) -> Release:
        """Which texts ask for more effort; a model outside the registry tells by its name."""
        if self.spec is not None:
            return self.spec.release
        return "0731" if any(date in self.name for date in SUMMER_RELEASES) else "preview"


def embedded_model_path() -> Path:
    """Return the folder of the small model inside the package."""
    return Path(__file__).parents[1] / "embedded" / EMBEDDED_NAME


def list_installed() -> list[InstalledModel]:
    """Return every model that is ready to use; the embedded one comes last."""
    return [model for model in _scan(load_registry()) if model.problem is None] + [_embedded()]


def list_incomplete() -> list[InstalledModel]:
    """Return the models of which files are missing or damaged, each with its `problem`."""
    return [model for model in _scan(load_registry()) if model.problem is not None]


def resolve(reference: str | None) -> InstalledModel:
    """Return the model that the reference means.

    A reference is a path, `name`, `name:quant`, an alias, or `hf://org/repo[:quant]`. None means
    `LOCALV4_MODEL`, else the only installed model, else the embedded one. Raises NotFoundError when
    there is no such model and UsageError when several match.
    """
    reference = reference or os.environ.get("LOCALV4_MODEL") or None
    if reference is None:
        return _default()
    if "\0" in reference or not _is_encodable(reference):
        raise UsageError("a model name cannot hold such characters", hint="localv4 list")
    if _looks_like_path(reference):
        return _from_path(Path(os.path.expanduser(reference)))  # noqa: PTH111 - that of Path raises
    if reference.lower() == EMBEDDED_NAME:
        return _embedded()
    if reference.startswith(_HUB_PREFIX):
        return _from_hub(reference.removeprefix(_HUB_PREFIX))
    return _from_name(reference)


def matching(reference: str) -> list[InstalledModel]:
    """Return all models, complete or not, that a reference may mean; a path means none but ours.

    Without a quantization all forms of a model match.
    """
    if reference.lower() == EMBEDDED_NAME:
        return [_embedded()]
    registry = load_registry()
    everything = list(_scan(registry))
    if reference.startswith(_HUB_PREFIX):
        repo, _, quant = reference.removeprefix(_HUB_PREFIX).partition(":")
        cached = hub_cache.cached_repo(repo) if repo.count("/") == 1 and ".." not in repo else None
        models = list(_models_of_repo(cached, registry)) if cached else []
    elif _looks_like_path(reference):
        place = Path(os.path.expanduser(reference)).absolute()  # noqa: PTH111 - that of Path raises
        models, quant = [model for model in everything if model.path == place], ""
    else:
        base, _, quant = reference.partition(":")
        models = _named(base, registry, everything)
    exact = [model for model in models if model.quant.lower() == quant.lower()]
    return exact if quant or exact else models


def _named(base: str, registry: Registry, models: list[InstalledModel]) -> list[InstalledModel]:
    """Return the models of this name, else those of the published model that it is a name of."""
    exact = [model for model in models if model.base_name.lower() == base.lower()]
    name = registry.find(base)
    if exact or name is None:
        return exact
    return [model for model in models if registry.find(model.base_name) == name]


def _embedded() -> InstalledModel:
    path = embedded_model_path()
    sets = _weight_sets(path)
    if len(sets) != 1 or sets[0].problem is not None:
        problem = sets[0].problem if sets else "the weight files are missing"
        raise BadFileError(path, str(problem), hint="pip install --force-reinstall localv4")
    weights = sets[0]
    return InstalledModel(EMBEDDED_NAME, path, "embedded", weights.format, weights.nbytes, None)


def _default() -> InstalledModel:
    # The registry is read only where there is something to look up in it: a broken user file must
    # not stop the embedded model.
    if not any(_entries(paths.models_dir())) and not any(hub_cache.cached_repos()):
        return _embedded()
    ready = [model for model in _scan(load_registry()) if model.problem is None]
    if not ready:
        return _embedded()
    if len(ready) > 1:
        names = ", ".join(model.name for model in ready)
        raise UsageError(f"several models are installed: {names}", hint="choose one with -m NAME")
    return ready[0]


def _scan(registry: Registry) -> Iterator[InstalledModel]:
    """Yield all models but the embedded one, complete or not."""
    yield from _scan_home(registry)
    known = {spec.repo.lower() for spec in registry.models.values()}
    for cached in hub_cache.cached_repos(known):
        yield from _models_of_repo(cached, registry)


def _scan_home(registry: Registry) -> Iterator[InstalledModel]:
    for entry in _entries(paths.models_dir()):
        name = entry.stem if entry.suffix.lower() == ".gguf" else entry.name
        own_name = registry.find(name)
        spec = registry.models[own_name] if own_name else None
        sets = _weight_sets(entry)
        for weights in sets:
            yield _installed(name, weights, "home", spec, alone=len(sets) == 1)


def _models_of_repo(cached: hub_cache.CachedRepo, registry: Registry) -> Iterator[InstalledModel]:
    """Yield the forms of a downloaded repository, from the most complete of its revisions."""
    entries = dict(registry.of_repo(cached.repo))
    pinned = {spec.revision for spec in entries.values()}
    snapshots = sorted(cached.snapshots, key=lambda item: item.name not in pinned)
    forms = [(folder, _weight_sets(folder)) for folder in snapshots]
    folder, sets = max(forms, key=lambda form: sum(item.problem is None for item in form[1]))
    for weights in sets:
        name, spec, quant = _match_entry(entries, weights, folder)
        labelled = replace(weights, label=quant) if quant else weights
        alone = len(sets) == 1 and quant is None
        yield _installed(name or _HUB_PREFIX + cached.repo, labelled, "hub-cache", spec, alone)


def _match_entry(
    entries: dict[str, ModelSpec], weights: WeightSet, folder: Path
) -> tuple[str | None, ModelSpec | None, str | None]:
    """Find the registry entry, and the quantization in it, whose files these are."""
    if weights.format == "gguf":
        file = weights.path.relative_to(folder).as_posix()
        for name, spec in entries.items():
            for quant, published in spec.quants.items():
                if fnmatchcase(file, published.files):
                    return name, spec, quant
    matching = [(name, spec) for name, spec in entries.items() if spec.format == weights.format]
    # A repository of several models and a file that none of them lists: no name beats a wrong one.
    return (*matching[0], None) if len(matching) == 1 else (None, None, None)


def _installed(
    name: str,
    weights: WeightSet,
    source: Literal["home", "hub-cache"],
    spec: ModelSpec | None,
    alone: bool,
) -> InstalledModel:
    """Name the set; a lone one needs no quantization in its name."""
    return InstalledModel(
        name=name if alone or not weights.label else f"{name}:{weights.label}",
        path=weights.path,
        source=source,
        format=weights.format,
        nbytes=weights.nbytes,
        spec=spec,
        quant=weights.label,
        problem=weights.problem,
    )


def _entries(folder: Path) -> list[Path]:
    """Return what may be a model in the folder of models; unfinished work has a dot in front."""
    try:
        found = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    except OSError:
        return []
    return [item for item in found if item.is_dir() or item.suffix.lower() == ".gguf"]


def _weight_sets(path: Path) -> list[WeightSet]:
    """Return the sets in a folder or of a GGUF file; none when it cannot be read."""
    try:
        return [gguf_set_of(path)] if path.is_file() else find_weight_sets(path)
    except OSError:
        return []


def _is_encodable(reference: str) -> bool:
    """Tell whether the operating system can be asked for a file of this name."""
    try:
        os.fsencode(reference)
    except UnicodeEncodeError:
        return False
    return True


def _looks_like_path(reference: str) -> bool:
    """Tell a path from a name. A bare word is a name, even where a folder of that name lies here.

    A model must not change with the folder that one happens to stand in.
    """
    if reference.startswith(_HUB_PREFIX):
        return False
    separators = {os.sep, os.altsep or os.sep, "/"}
    return (
        reference.startswith(("~", "."))
        or reference.lower().endswith((".gguf", ".safetensors"))
        or any(separator in reference for separator in separators)
    )


def _from_path(path: Path) -> InstalledModel:
    try:
        if not path.exists():
            raise NotFoundError(f"no such file or folder: {path}", hint=_similar_path(path))
        if path.is_file():
            return _from_file(path)
        if not path.is_dir():
            raise UsageError(f"{path} is neither a file nor a folder", hint="localv4 list")
        sets = find_weight_sets(path)
    except OSError as error:
        raise LocalV4Error(f"cannot read {path}: {error.strerror or error}") from error
    if not sets:
        raise NotFoundError(
            f"no model in {path}",
            hint="name a folder with config.json and *.safetensors, or a .gguf file",
        )
    if len(sets) > 1:
        names = ", ".join(weights.path.relative_to(path).as_posix() for weights in sets)
        raise UsageError(f"several models in {path}: {names}", hint="name one of the files")
    return _at_path(path.name or str(path), sets[0])


def _from_file(path: Path) -> InstalledModel:
    if path.suffix.lower() == ".gguf":
        return _at_path(path.stem, replace(gguf_set_of(path), path=path))
    if path.suffix.lower() == ".safetensors":
        return InstalledModel(
            path.stem, path, "path", "safetensors", path.stat().st_size, spec=None
        )
    raise UsageError(f"{path} is no model file", hint="a model is a folder or a .gguf file")


def _at_path(name: str, weights: WeightSet) -> InstalledModel:
    # An incomplete set is let through: opening it names the missing file.
    return InstalledModel(name, weights.path, "path", weights.format, weights.nbytes, None)


def _similar_path(path: Path) -> str | None:
    """Return a hint with the neighbour whose name is nearest to a mistyped one."""
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"did you mean {path.parent / nearest[0]}" if nearest else None


def _from_hub(reference: str) -> InstalledModel:
    """Find `org/repo[:quant]` in the Hugging Face cache."""
    repo, _, quant = reference.partition(":")
    if repo.count("/") != 1 or ".." in repo:
        raise UsageError(f'"{_HUB_PREFIX}{reference}" is no repository', hint="write hf://org/repo")
    cached = hub_cache.cached_repo(repo)
    models = list(_models_of_repo(cached, load_registry())) if cached else []
    return _choose(models, f"{_HUB_PREFIX}{repo}", quant, f"localv4 pull {_HUB_PREFIX}{reference}")


def _from_name(reference: str) -> InstalledModel:
    base, _, quant = reference.partition(":")
    registry = load_registry()
    installed = list(_scan(registry))
    name = registry.find(base)
    models = _named(base, registry, installed)
    if not models and name is None:
        raise _unknown(reference, registry, installed)
    hint = _download_hint(base, quant, registry.models[name]) if name else None
    return _choose(models, base, quant, hint)


def _download_hint(name: str, quant: str, spec: ModelSpec) -> str:
    """Tell what to type to fetch one form of the model, without the others in its repository."""
    published = {label.lower(): label for label in spec.quants}
    if published and quant.lower() not in published:
        return "choose one: " + ", ".join(f"{name}:{label}" for label in spec.quants)
    if published:
        return f"localv4 pull {name}:{published[quant.lower()]}"
    made = f", then: localv4 quantize {name} --recipe {quant}" if quant else ""
    return f"localv4 pull {name}{made}"


def _unknown(reference: str, registry: Registry, installed: list[InstalledModel]) -> NotFoundError:
    base = reference.partition(":")[0]
    others = (EMBEDDED_NAME, *(model.base_name.lower() for model in installed))
    nearest = registry.suggest(base, others)
    if Path(reference).exists():
        hint = f"to use the folder of that name, write ./{reference}"
    else:
        hint = f"did you mean {nearest}" if nearest else "localv4 list shows what is here"
    return NotFoundError(f'no model is called "{reference}"', hint=hint)


def _choose(
    models: list[InstalledModel], name: str, quant: str, download_hint: str | None
) -> InstalledModel:
    """Return the one form of a model that is ready and fits the quantization.

    Without a quantization the published weights win, then a form that is alone. Of two equal forms
    the first one wins, which is that of the models folder.
    """
    forms = {model.quant.lower(): model for model in reversed(models)}
    fitting = [forms[quant.lower()]] if quant.lower() in forms else []
    if not quant and not any(model.problem is None for model in fitting):
        fitting = list(forms.values())
    ready = [model for model in fitting if model.problem is None]
    if len(ready) == 1:
        return ready[0]
    names = ", ".join(model.name for model in models)
    if ready:
        raise UsageError(f"{name} is here in several forms", hint=f"choose one: {names}")
    full_name = f"{name}:{quant}" if quant else name
    if fitting:
        problem = f"{full_name} is incomplete: {fitting[0].problem} ({fitting[0].path})"
        raise NotFoundError(problem, hint=download_hint)
    if models:
        raise NotFoundError(f"{full_name} is not here", hint=f"there is {names}")
    raise NotFoundError(f"{full_name} is not installed", hint=download_hint)
