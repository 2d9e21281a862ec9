"""Which model a question is about, and in which forms it can be had."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from localv4.errors import NotFoundError, UsageError
from localv4.kernels.row_operations import RowFormat
from localv4.library import installed
from localv4.library.installed import InstalledModel
from localv4.library.registry import ModelSpec, QuantSpec, Registry, load_registry
from localv4.model.config import ModelConfig
from localv4.model.config_json import read_config
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.planning.model_facts import ModelFacts, facts_of_recipe
from localv4.planning.network import parameters
from localv4.planning.recipes import load_recipes
from localv4.storage import open_checkpoint

HUB_PREFIX = "hf://"
NETWORKS = Path(__file__).parent / "networks"
_FP4 = "I8"
_GB = 1e9

Source = Literal["installed", "registry", "hub"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and the forms of it, the most precise first.

    `chosen` is the number of the form that was asked for, None where there is a choice. `path`
    tells where an installed one is. A recipe is a form that `quantize` makes.
    """

    name: str
    source: Source
    forms: tuple[ModelFacts, ...]
    chosen: int | None = None
    path: Path | None = None

    def with_rows(self, rows: RowFormat) -> "Subject":
        """Return the same with compressed rows of the context in another format."""
        return replace(self, forms=tuple(replace(form, rows=rows) for form in self.forms))


def find_subject(reference: str | None) -> Subject:
    """Return what `name[:quant]`, an alias, or a path means; reads headers of files that are here.

    For what is on the hub alone, `hub_subject` asks it. Raises NotFoundError for a name that nobody
    knows, UsageError for a quantization that does not exist, BadFileError for damaged files.
    """
    registry = load_registry()
    base, _, quant = (reference or "").partition(":")
    recipe = load_recipes().by_name.get(quant.lower()) if quant else None
    name = registry.find(base)
    try:
        model = installed.resolve(base if recipe is not None else reference)
    except NotFoundError:
        if name is None:
            raise
        return _known(name, registry, quant)
    if recipe is None:
        return Subject(model.name, "installed", (facts_of_installed(model),), 0, model.path)
    if name is not None and registry.models[name].format == "safetensors":
        return _known(name, registry, quant)
    own = facts_of_installed(model)
    facts = facts_of_recipe(f"{model.name}:{quant}", own.config, recipe)
    return Subject(model.name, "installed", (facts,), 0, model.path)


def facts_of_installed(model: InstalledModel) -> ModelFacts:
    """Read the headers of a model that is here. Raises NotFoundError or BadFileError."""
    with open_checkpoint(model.path) as checkpoint:
        return facts_of_checkpoint(model.name, model.quant, checkpoint)


def facts_of_opened(name: str, path: Path, download_bytes: int) -> ModelFacts:
    """Read the headers of a model on the hub that `library.remote_headers` has fetched."""
    with open_checkpoint(path) as checkpoint:
        return facts_of_checkpoint(name, "", checkpoint, download_bytes=download_bytes)


def with_recipes(subject: Subject) -> Subject:
    """Return an installed official model together with the recipes that it can be turned into."""
    registry = load_registry()
    name = registry.find(subject.name.partition(":")[0])
    if subject.source != "installed" or name is None:
        return subject
    if registry.models[name].format != "safetensors" or subject.forms[0].is_packed:
        return subject
    known = _known(name, registry, "")
    return replace(subject, forms=(*subject.forms, *known.forms), chosen=None)


@cache
def known_networks() -> tuple[ModelConfig, ...]:
    """Return the configurations that come with the package."""
    return tuple(read_config(path) for path in sorted(NETWORKS.glob("*.json")))


def flash_network() -> ModelConfig:
    """Return the smallest of the released networks, which this engine is made for."""
    return min(known_networks(), key=parameters)


def _known(name: str, registry: Registry, quant: str) -> Subject:
    """Return a model of the registry that is not here."""
    spec = registry.models[name]
    config = _network_of(spec, registry)
    if config is None:
        hint = f"its headers can be asked for: localv4 fit {HUB_PREFIX}{spec.repo}"
        raise NotFoundError(f"nothing but the name of {name} is known", hint=hint)
    if spec.format == "safetensors":
        return _official(name, spec, config, quant)
    forms = [
        _published(f"{name}:{label}", label, config, size)
        for label, published in spec.quants.items()
        if (size := _size_of(published)) is not None
    ]
    forms.sort(key=lambda facts: -facts.file_bytes)
    return _chosen(name, tuple(forms), quant)


def _official(name: str, spec: ModelSpec, config: ModelConfig, quant: str) -> Subject:
    size = spec.tensor_bytes or (int(spec.approx_gb * _GB) if spec.approx_gb else None)
    has_fp4 = not spec.dtypes or _FP4 in spec.dtypes  # experts of base models are FP8
    recipes = [r for r in load_recipes().by_name.values() if has_fp4 or r.name != "lossless"]
    forms = [
        facts_of_recipe(f"{name}:{recipe.name}", config, recipe, download_bytes=size)
        for recipe in recipes
    ]
    return _chosen(name, tuple(forms), quant)


def _chosen(name: str, forms: tuple[ModelFacts, ...], quant: str) -> Subject:
    labels = [facts.quant.lower() for facts in forms]
    if not quant:
        return Subject(name, "registry", forms, 0 if len(forms) == 1 else None)
    if quant.lower() not in labels:
        choices = ", ".join(facts.name for facts in forms)
        raise UsageError(f"{name} has no form {quant}", hint=f"choose one: {choices}")
    return Subject(name, "registry", forms, labels.index(quant.lower()))


def _network_of(spec: ModelSpec, registry: Registry) -> ModelConfig | None:
    """Return the configuration with as many weights as a model, or what it was made from, has."""
    base = registry.models[spec.base] if spec.base is not None else spec
    fitting = (config for config in known_networks() if parameters(config) == base.params)
    return next(fitting, None)


def _size_of(quant: QuantSpec) -> int | None:
    if quant.bytes is not None:
        return quant.bytes
    return int(quant.approx_gb * _GB) if quant.approx_gb is not None else None


def _published(name: str, label: str, config: ModelConfig, size: int) -> ModelFacts:
    """Estimate a GGUF file from its size: 8-bit dense weights, experts are what is left."""
    dense = facts_of_recipe(name, config, load_recipes().by_name["q8"])
    others = dense.file_bytes - dense.all_expert_bytes
    one = max(1, size - others) // (config.n_layers * config.n_experts)
    return replace(
        dense,
        quant=label,
        expert_bytes=(one,) * config.n_layers,
        expert_format=_nearest_format(8 * one / (3 * config.hidden_size * config.expert_width)),
        file_bytes=size,
        download_bytes=size,
        is_packed=False,
        is_exact=False,
    )


_BITS = {"IQ2": 2.06, "Q2": 2.63, "Q3": 3.44, "MX4": 4.25, "Q4K": 4.5, "Q6": 6.56, "Q8": 8.5}


def _nearest_format(bits: float) -> str:
    return min(_BITS, key=lambda name: abs(_BITS[name] - bits))


def is_hub_reference(reference: str | None) -> bool:
    """Tell whether a reference names a repository: `hf://org/repo`."""
    return reference is not None and reference.startswith(HUB_PREFIX)


def is_here(reference: str) -> bool:
    """Tell whether a repository of the hub is in its cache."""
    with suppress(NotFoundError):
        return installed.resolve(reference).problem is None
    return False
