"""Which weights lie in a folder, and whether all files of them are there. Opens no weight file."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from localv4.errors import BadFileError, LocalV4Error
from localv4.small_file import read_small_file
from localv4.storage.manifest import is_packed_folder, read_manifest
from localv4.storage.safetensors import SUFFIX

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20  # the largest published index (145,116 tensors) has about 14 MB
MAX_FOLDER_FILES = 20_000  # a folder with more is no model folder

INDEX_NAME = "model.safetensors.index.json"
PACKING_NAME = ".packing.json"  # the journal of a packer that has not finished
SAFETENSORS_PART = re.compile(r"^.+-(\d{5})-of-(\d{5})\.safetensors$")
GGUF_PART = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")

# Files beside a model that are no model: draft modules, vision encoders, calibration data.
_COMPANION = re.compile(
    r"^(?:mtp|dspark|mmproj|imatrix)\b|-(?:MTP|DSpark-support|DSpark-drafter|Vision-Encoder)\b",
    re.IGNORECASE,
)
_QUANT_LABEL = re.compile(
    r"(?:UD-)?(?:IQ\d_(?:XXS|XS|S|M|NL)|Q\d_(?:K_(?:XL|[SML])|[K01])|MXFP4(?:_MOE)?|BF16|F16|F32)"
)


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The weight files of one model, or of one quantization of it."""

    format: Literal["safetensors", "gguf", "packed"]
    path: Path  # what to open: the folder, or the first GGUF file
    label: str  # the quantization's name, "" for weights as they were published
    nbytes: int
    problem: str | None = None  # why it cannot be used


def find_weight_sets(folder: Path) -> list[WeightSet]:
    """Return the sets in `folder` and in its direct subfolders.

    Raises OSError when the folder cannot be read.
    """
    subfolders = sorted(_subfolders(folder))
    packed = [place for place in (folder, *subfolders) if is_packed(place)]
    sets = [_packed_set(place, "" if place is folder else place.name) for place in packed]
    if folder not in packed and (root := _safetensors_set(folder, "")):
        sets.append(root)
    for subfolder in subfolders:
        if (
            subfolder not in packed
            and _names_model(subfolder)
            and (inner := _safetensors_set(subfolder, subfolder.name))
        ):
            sets.append(inner)
    for place in (folder, *subfolders):
        if place not in packed:  # there metadata.gguf is no model of its own
            sets += _gguf_sets(list(_gguf_files(place)))
    times = Counter(weights.label for weights in sets)
    return [
        replace(weights, label=weights.path.stem) if times[weights.label] > 1 else weights
        for weights in sets
    ]


def gguf_set_of(file: Path) -> WeightSet:
    """Return the set that a GGUF file belongs to: the file alone, or all parts of a split."""
    return _gguf_sets(files_of_gguf(file))[0]


def files_of_gguf(file: Path) -> list[Path]:
    """Return the file, or all parts of the split that it belongs to."""
    split = GGUF_PART.match(file.name)
    if split is None:
        return [file]
    return [
        other
        for other in _limited(file.parent)
        if (match := GGUF_PART.match(other.name))
        and match["stem"] == split["stem"]
        and match["count"] == split["count"]
    ]


def model_type(folder: Path) -> str | None:
    """Return `model_type` of the folder's config.json, None where there is no readable one."""
    config = _read_json(folder / "config.json", MAX_CONFIG_BYTES)
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def is_packed(folder: Path) -> bool:
    """Tell whether the folder is a packed model; one that cannot be read is none."""
    try:
        return is_packed_folder(folder)
    except LocalV4Error:
        return False


def _names_model(folder: Path) -> bool:
    """Tell whether a subfolder with weights is a model of its own, finished or not."""
    return (folder / "config.json").is_file() or (folder / PACKING_NAME).is_file()


def _packed_set(folder: Path, label: str) -> WeightSet:
    """Describe the packed model in `folder` by its manifest."""
    try:
        files = read_manifest(folder).files
    except LocalV4Error as error:
        reason = error.detail if isinstance(error, BadFileError) else error.message
        return WeightSet("packed", folder, label, 0, reason)
    shards = {name: entry.nbytes for name, entry in files.items() if name.endswith(SUFFIX)}
    missing = [name for name in files if not (folder / name).is_file()]
    problem = f"{len(missing)} of {len(files)} files are missing" if missing else None
    return WeightSet("packed", folder, label, sum(shards.values()), problem)


def _safetensors_set(folder: Path, label: str) -> WeightSet | None:
    """Describe the safetensors model in `folder`, None when no weight file is there."""
    files = {file.name: file for file in _limited(folder) if file.suffix.lower() == ".safetensors"}
    present = {name: file.stat().st_size for name, file in files.items() if file.is_file()}
    if not present:
        return None
    problem = None
    index = folder / INDEX_NAME
    if index.exists():
        wanted = _indexed_files(index)
        if wanted is None:
            problem = f"{INDEX_NAME} is damaged"
    else:
        wanted = _numbered_files(present)
    if wanted and (missing := wanted - present.keys()):
        problem = f"{len(missing)} of {len(wanted)} weight files are missing"
    if (folder / PACKING_NAME).is_file():
        problem = "it is being packed, or that was stopped"
    if problem is None and not (folder / "config.json").is_file():
        problem = "config.json is missing"
    return WeightSet("safetensors", folder, label, sum(present.values()), problem)


def _indexed_files(index: Path) -> set[str] | None:
    """Return the names of all shards in the index, None when the index cannot be trusted."""
    table = _read_json(index, MAX_INDEX_BYTES)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return None
    names = weight_map.values()
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        return None
    return set(names)


def _numbered_files(present: dict[str, int]) -> set[str]:
    """Return the shard names that `model-00002-of-00046.safetensors` and the like ask for."""
    wanted = set()
    for name in present:
        if match := SAFETENSORS_PART.match(name):
            head = name[: match.start(1)]
            for part in range(1, min(int(match[2]), MAX_FOLDER_FILES) + 1):
                wanted.add(f"{head}{part:05d}-of-{match[2]}.safetensors")
            break
    return wanted


def _gguf_sets(files: list[Path]) -> list[WeightSet]:
    """Group GGUF files of one folder into single files and split sets."""
    groups: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for file in files:
        match = GGUF_PART.match(file.name)
        key = (match["stem"], int(match["count"])) if match else (file.stem, 1)
        groups[key][int(match["part"]) if match else 1] = file
    sets = []
    for (stem, count), parts in sorted(groups.items()):
        missing = count - len(parts)
        problem = f"{missing} of {count} parts are missing" if missing > 0 else None
        nbytes = sum(file.stat().st_size for file in parts.values())
        sets.append(WeightSet("gguf", parts[min(parts)], quant_label(stem), nbytes, problem))
    return sets


def quant_label(stem: str) -> str:
    """Return the quantization that a file name tells, else the name itself."""
    labels = _QUANT_LABEL.findall(stem)
    return labels[-1] if labels else stem


def is_companion(name: str) -> bool:
    """Tell whether a GGUF file is no model: a draft module, a vision encoder, calibration data."""
    return _COMPANION.search(name) is not None


def _gguf_files(folder: Path) -> Iterator[Path]:
    for file in _limited(folder):
        if file.suffix.lower() == ".gguf" and file.is_file() and not is_companion(file.name):
            yield file


def _subfolders(folder: Path) -> Iterator[Path]:
    for item in _limited(folder):
        if item.is_dir() and not item.name.startswith("."):
            yield item


def _limited(folder: Path) -> Iterator[Path]:
    """Yield the folder's entries, but never an endless number of them."""
    for count, item in enumerate(folder.iterdir()):
        if count >= MAX_FOLDER_FILES:
            return
        yield item


def _read_json(file: Path, limit: int) -> Any:
    """Return the parsed file; None when it is absent, too large or no JSON."""
    try:
        return json.loads(read_small_file(file, limit))
    except (LocalV4Error, ValueError, RecursionError):
        return None
