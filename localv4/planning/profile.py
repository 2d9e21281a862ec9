"""What was measured of this machine, kept in the cache folder until the machine is another one."""

from contextlib import suppress
from datetime import date
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from localv4 import paths
from localv4.errors import LocalV4Error
from localv4.finished_file import finished_file
from localv4.kernels.isa import ISA
from localv4.kernels.threads import default_threads
from localv4.planning.processor import cpu_name
from localv4.small_file import read_small_file

SCHEMA = 1
FILE_NAME = "machine.json"
MAX_PROFILE_BYTES = 1 << 16
MAX_DISKS = 16
RAM_STEP = 1 << 28


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Identity(_Table):
    """What makes a machine the same one. Rounded memory: kernels keep some of it, not always."""

    cpu: str
    isa: str
    threads: int
    ram_steps: int


class DiskProfile(_Table):
    """Random reads of one disk, as `paging.probe` measures them."""

    bytes_s: float = Field(gt=0)
    core_s_per_gb: float = Field(ge=0)
    readers: int = Field(gt=0)
    record_bytes: int = Field(gt=0)
    io: str
    measured_on: date


class KernelProfile(_Table):
    """Shares of the roofs that kernels reach in the published formats (`machine.KernelShares`)."""

    decode: float = Field(gt=0)
    prefill: float = Field(gt=0)
    layer_s: float = Field(ge=0)
    measured_on: date


class RoofProfile(_Table):
    """Roofs: read bytes per second by threads, int8 operations per second of all."""

    read_by_threads: dict[int, float]
    int8_ops_s: float = Field(gt=0)
    measured_on: date


class GpuProfile(_Table):
    """A GPU: what it copies, is sent, and multiplies per second (`cuda.speed.GpuSpeed`)."""

    copy_bytes_s: float = Field(gt=0)
    upload_bytes_s: float = Field(gt=0)
    product_ops_s: float = Field(gt=0)
    measured_on: date


class Profile(_Table):
    """Everything that was measured; what is None or absent was not."""

    version: int = SCHEMA
    machine: Identity
    roofs: RoofProfile | None = None
    kernels: KernelProfile | None = None
    disks: dict[str, DiskProfile] = {}
    gpus: dict[str, GpuProfile] = {}

    def with_disk(self, key: str, disk: DiskProfile) -> "Profile":
        """Return the profile with another disk; the one measured first gives way to too many."""
        disks = {name: known for name, known in self.disks.items() if name != key} | {key: disk}
        kept = dict(list(disks.items())[-MAX_DISKS:])
        return self.model_copy(update={"disks": kept})


def this_machine() -> Identity:
    """Return the identity of the machine that this runs on."""
    return Identity(
        cpu=cpu_name(),
        isa=ISA.level,
        threads=default_threads(),
        ram_steps=round(psutil.virtual_memory().total / RAM_STEP),
    )


def load_profile() -> Profile:
    """Return what is known of this machine; nothing if it was measured on another one."""
    identity = this_machine()
    try:
        found = Profile.model_validate_json(read_small_file(_path(), MAX_PROFILE_BYTES))
    except (LocalV4Error, ValidationError, ValueError):
        return Profile(machine=identity)
    same = found.version == SCHEMA and found.machine == identity
    return found if same else Profile(machine=identity)


def save_profile(profile: Profile) -> None:
    """Keep a profile; a cache that cannot be written to is measured anew every time."""
    path = _path()
    with suppress(OSError, LocalV4Error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with finished_file(path) as file:
            file.write(profile.model_dump_json(indent=1).encode())


def disk_key(place: Path) -> str:
    """Return what tells the disk of a file or folder from others; places below may not exist."""
    existing = existing_parent(place)
    return f"{existing.stat().st_dev}-{psutil.disk_usage(str(existing)).total}"


def existing_parent(place: Path) -> Path:
    """Return the place itself, or the nearest folder above it that exists."""
    return next(path for path in (place, *place.absolute().parents) if path.exists())


def _path() -> Path:
    return paths.cache_dir() / FILE_NAME
