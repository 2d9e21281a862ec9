"""The registry: what is known of published models, read from `models.toml`.

The built-in file ships with the package; a user may add models in `models.toml` of the
configuration folder, but never change a built-in one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from localv4 import paths
from localv4.errors import BadFileError
from localv4.small_file import read_small_file
from localv4.toml_file import first_problem, parse_toml

SCHEMA_VERSION = 1
MAX_REGISTRY_BYTES = 128 * 1024  # the built-in file has under 20 kB

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
REPO_PATTERN = rf"^{_PART}/{_PART}$"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=96)]
QuantName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=64)
]
Repo = Annotated[str, StringConstraints(pattern=REPO_PATTERN, max_length=160)]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
RepoPath = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9*][A-Za-z0-9*._+/-]*$", max_length=300)
]
Count = Annotated[int, Field(gt=0, lt=2**63)]
# TOML knows lists only, hence not strict; the items stay strict.
Release = Literal["preview", "0731"]
Names = Annotated[tuple[Name, ...], Field(strict=False)]
RepoPaths = Annotated[tuple[RepoPath, ...], Field(strict=False)]
TypeNames = Annotated[tuple[str, ...], Field(strict=False)]
Dollars = Annotated[float, Field(ge=0, le=10_000)]


class _Table(BaseModel):
    """A TOML table: exact types, no unknown keys, unchangeable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _paths_stay_inside(self) -> Self:
        for value in self.__dict__.values():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and ".." in text:
                    raise ValueError(f'"{text}" holds ".."')
        return self


class ApiPrice(_Table):
    """What the maker's own API asked, in US dollars per million tokens, for comparison.

    With a `peak_factor` the prices are those of the quiet hours and the factor tells the busy ones.
    """

    as_of: date
    input_cache_hit: Dollars
    input_cache_miss: Dollars
    output: Dollars
    peak_factor: Annotated[float, Field(gt=1, le=10)] | None = None
    until: date | None = None  # the API serves another model since


class QuantSpec(_Table):
    """One published file set of a repository that offers several."""

    files: RepoPath  # name or pattern inside the repository
    types: TypeNames = ()  # block types known to be in it
    bytes: Count | None = None  # exact
    approx_gb: Annotated[float, Field(gt=0)] | None = None  # decimal, as published, rounded

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.bytes is not None and self.approx_gb is not None:
            raise ValueError("give bytes or approx_gb, not both")
        return self


class ModelSpec(_Table):
    """One published model. What is not known for certain is absent."""

    aliases: Names = ()
    repo: Repo
    revision: Revision | None = None
    license: str | None = None  # SPDX identifier
    arch: Literal["deepseek_v4"]
    format: Literal["safetensors", "gguf"]
    base: Name | None = None  # the registry name of the model it was converted from
    release: Release  # decides the texts of the reasoning effort
    chat: bool = True
    draft: Literal["mtp", "dspark"] | None = None
    allow: RepoPaths
    context: Count | None = None  # tokens
    params: Count | None = None  # of the backbone, without draft modules
    tensors: Count | None = None
    tensor_bytes: Count | None = None
    approx_gb: Annotated[float, Field(gt=0)] | None = None
    shards: Count | None = None
    dtypes: TypeNames = ()
    api_price: ApiPrice | None = None
    quants: dict[QuantName, QuantSpec] = Field(default_factory=dict)


class _RegistryFile(_Table):
    # "schema" is a method of pydantic's own base class, hence the alias
    version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = Field(alias="schema")
    models: dict[Name, ModelSpec]


@dataclass(frozen=True)
class Registry:
    """All known models by name. `find` also knows aliases and repositories."""

    models: Mapping[str, ModelSpec]

    @cached_property
    def _names(self) -> dict[str, str]:
        names = {name: name for name in self.models}
        for name, spec in self.models.items():
            names |= dict.fromkeys(spec.aliases, name)
        return names

    def find(self, name: str) -> str | None:
        """Return the model's own name for a name or alias in any case, None when unknown."""
        return self._names.get(name.lower())

    def of_repo(self, repo: str) -> Iterator[tuple[str, ModelSpec]]:
        """Yield every model that is published in the repository, official ones first."""
        wanted = repo.lower()
        for name, spec in self.models.items():
            if spec.repo.lower() == wanted:
                yield name, spec

    def suggest(self, name: str, others: tuple[str, ...] = ()) -> str | None:
        """Return the known name or alias nearest to a mistyped one, or one of `others`."""
        known = [*self._names, *others]
        nearest = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
        return nearest[0] if nearest else None


def load_registry() -> Registry:
    """Read the built-in registry and the user's additions.

    Raises BadFileError naming the file and the line or field that is wrong.
    """
    models = _read(_built_in_path())
    extra_path = paths.config_dir() / "models.toml"
    if extra_path.exists():
        extra = _read(extra_path)
        for name in extra:
            if name in models:
                raise BadFileError(
                    extra_path,
                    f"models.{name}: a built-in model cannot be changed",
                    hint="give the entry another name",
                )
        models = models | extra
        _check_names(models, extra_path)
    return Registry(models)


def _built_in_path() -> Path:
    """Return `models.toml`: beside the modules in an installed wheel, else in the source tree."""
    package = Path(__file__).parents[1]
    installed = package / "models.toml"
    return installed if installed.is_file() else package.parent / "models.toml"


def _read(path: Path) -> dict[str, ModelSpec]:
    table = parse_toml(read_small_file(path, MAX_REGISTRY_BYTES), path)
    version = table.get("schema")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BadFileError(
            path,
            f"schema {version} was made by a newer version; this one reads {SCHEMA_VERSION}",
            hint="pip install --upgrade localv4",
        )
    try:
        models = _RegistryFile.model_validate(table).models
    except ValidationError as error:
        tables = (_RegistryFile, ModelSpec, QuantSpec, ApiPrice)
        known = {key for table_type in tables for key in table_type.model_fields}
        raise BadFileError(path, first_problem(error, known)) from error
    _check_names(models, path)
    return models


def _check_names(models: Mapping[str, ModelSpec], path: Path) -> None:
    """Raise BadFileError when two models share a name, or a base is not in the registry."""
    owner = {name: name for name in models}
    for name, spec in models.items():
        for alias in spec.aliases:
            if alias in owner:
                detail = f'models.{name}.aliases: "{alias}" already names {owner[alias]}'
                raise BadFileError(path, detail)
            owner[alias] = name
        if spec.base is not None and spec.base not in models:
            raise BadFileError(path, f'models.{name}.base: no model "{spec.base}"')
