"""Measures this machine in seconds, or takes what was measured before."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

import psutil

from localv4.cuda.gpu import GpuError
from localv4.cuda.options import GpuOptions, has_library
from localv4.cuda.speed import GpuSpeed
from localv4.errors import DoesNotFitError, LocalV4Error
from localv4.kernels.isa import ISA
from localv4.kernels.threads import default_threads
from localv4.model.config import ModelConfig
from localv4.paging.probe import measure_disk
from localv4.planning.kernel_probe import measure_kernels
from localv4.planning.machine import DiskFacts, GpuFacts, KernelShares, Machine
from localv4.planning.memory import read_memory
from localv4.planning.plan import READERS
from localv4.planning.processor import cpu_name
from localv4.planning.profile import (
    DiskProfile,
    GpuProfile,
    KernelProfile,
    Profile,
    RoofProfile,
    disk_key,
    existing_parent,
    load_profile,
    save_profile,
)
from localv4.planning.recipes import Recipe
from localv4.planning.roofs import ROOF_BYTES, RoofProbe
from localv4.planning.system import graphics_cards, swap_is_compressed

FLASH_RECORD_BYTES = 13_369_344
"""An expert of V4-Flash: what disks are measured with unless a model says otherwise."""

DISK_SECONDS = 4.0
ROOF_SHARE = 4
"""The read roof is measured on a quarter of the available memory at most."""

OnStep = Callable[[str], None]
"""Told what is being measured."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to be known. `place` names the disk; None: no disk matters. `gpu` says which GPU
    counts, if there is one.

    `kernels` has a network and a recipe to run layers of; None: constants will do. `anew` measures
    again what is known.
    """

    place: Path | None = None
    record_bytes: int = FLASH_RECORD_BYTES
    kernels: tuple[ModelConfig, Recipe] | None = None
    anew: bool = False
    gpu: GpuOptions = field(default_factory=lambda: GpuOptions("cpu"))


def known_machine(place: Path | None = None) -> Machine:
    """Return this machine with what was measured before; measures nothing."""
    return _machine(load_profile(), place)


def measured_machine(wanted: Wanted, on_step: OnStep | None = None) -> Machine:
    """Return this machine, measuring what is wanted and not known; keeps what it finds.

    Raises LocalV4Error if the disk cannot be measured.
    """
    tell = on_step or (lambda _what: None)
    profile = load_profile()
    if profile.roofs is None or wanted.anew:
        tell("memory bandwidth")
        profile = profile.model_copy(update={"roofs": _measure_roofs()})
        save_profile(profile)
    if wanted.place is not None:
        key = disk_key(wanted.place)
        if key not in profile.disks or wanted.anew:
            tell("random reads of the disk")
            profile = profile.with_disk(key, _measure_disk(wanted.place, wanted.record_bytes))
            save_profile(profile)
    if wanted.kernels is not None and (profile.kernels is None or wanted.anew):
        tell("kernels (a minute if they have to be compiled)")
        with suppress(DoesNotFitError):  # then constants have to do
            shares = measure_kernels(*wanted.kernels, default_threads())
            found = KernelProfile(
                decode=shares.decode,
                prefill=shares.prefill,
                layer_s=shares.layer_s,
                measured_on=date.today(),
            )
            profile = profile.model_copy(update={"kernels": found})
            save_profile(profile)
    machine = _machine(profile, wanted.place)
    return replace(machine, gpu=_found_gpu(profile, wanted, tell))


def known_gpu(name: str, total: int = 0, free: int = 0) -> GpuFacts | None:
    """Return a GPU with what was measured of it before; None if nothing was."""
    known = load_profile().gpus.get(name)
    if known is None:
        return None
    speed = GpuSpeed(known.copy_bytes_s, known.upload_bytes_s, known.product_ops_s)
    return GpuFacts(name, total, free, speed)


def _found_gpu(profile: Profile, wanted: Wanted, tell: OnStep) -> GpuFacts | None:
    """Return the GPU of this machine; None where there is none, or nothing to use it with.

    Raises DoesNotFitError when one was asked for by name.
    """
    if wanted.gpu.name == "cpu" or (wanted.gpu.name == "auto" and not has_library()):
        return None
    from localv4.cuda.offload import find_gpu
    from localv4.cuda.probe import measure

    try:
        gpu = find_gpu(wanted.gpu)
    except GpuError as error:
        if wanted.gpu.name == "cuda":
            raise DoesNotFitError(error.message, hint=error.hint) from error
        return None
    if gpu is None:
        return None
    try:
        memory = gpu.total_bytes, gpu.free_bytes()
        known = None if wanted.anew else known_gpu(gpu.name, *memory)
        if known is not None:
            return known
        tell("the GPU")
        speed = measure(gpu)
        found = GpuProfile(**asdict(speed), measured_on=date.today())
        save_profile(profile.model_copy(update={"gpus": {**profile.gpus, gpu.name: found}}))
        return GpuFacts(gpu.name, *memory, speed)
    except GpuError:  # with too little memory to measure anything, it cannot help either
        return None
    finally:
        gpu.close()


def _measure_roofs() -> RoofProfile:
    most = default_threads()
    counts = sorted({1, 2, 4, most} | {most // 2}) if most > 1 else [1]
    nbytes = min(ROOF_BYTES, read_memory().available // ROOF_SHARE)
    roofs = {n: RoofProbe(n, nbytes).measure() for n in counts if 0 < n <= most}
    return RoofProfile(
        read_by_threads={n: roof.read_bytes_s for n, roof in roofs.items()},
        int8_ops_s=roofs[most].int8_ops_s,
        measured_on=date.today(),
    )


def _measure_disk(place: Path, record_bytes: int) -> DiskProfile:
    existing = existing_parent(place)
    found = measure_disk(existing, record_bytes, READERS, DISK_SECONDS)
    if found.bytes_s <= 0:
        raise LocalV4Error(f"cannot measure the disk of {place}: nothing was read")
    return DiskProfile(
        bytes_s=found.bytes_s,
        core_s_per_gb=found.core_s_per_gb,
        readers=READERS,
        record_bytes=record_bytes,
        io=found.io,
        measured_on=date.today(),
    )


def _machine(profile: Profile, place: Path | None) -> Machine:
    roofs, kernels, disk = profile.roofs, profile.kernels, None
    if place is not None and (known := profile.disks.get(disk_key(place))) is not None:
        disk = DiskFacts(
            bytes_s=known.bytes_s,
            cpu_s_per_gb=known.core_s_per_gb,
            readers=known.readers,
        )
    free = psutil.disk_usage(str(existing_parent(place))).free if place is not None else None
    return Machine(
        memory=read_memory(),
        cores=default_threads(),
        read_bytes_s=max(roofs.read_by_threads.values()) if roofs else None,
        int8_ops_s=roofs.int8_ops_s if roofs else None,
        disk=disk,
        disk_free=free,
        kernels=KernelShares(kernels.decode, kernels.prefill, kernels.layer_s) if kernels else None,
        read_by_threads=roofs.read_by_threads if roofs else {},
        cpu=cpu_name(),
        isa=ISA.level,
        gpus=graphics_cards(),
        swap_is_compressed=swap_is_compressed(),
        measured_on=roofs.measured_on.isoformat() if roofs else None,
    )
