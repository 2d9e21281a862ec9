"""The GPU through the CUDA driver: memory, copies, launches, graphs."""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from localv4.cuda import merged
from localv4.cuda.compile_helpers import compile_all
from localv4.cuda.compiler import OLDEST, compiled
from localv4.cuda.gpu import (
    GpuError,
    GpuMemoryError,
    Launch,
    Mark,
    OnCompile,
    Recording,
    Step,
    no_library,
)

MOST_BRANCHES = 8
"""Sequences of launches that run at the same time; more of them take turns."""

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY"""

FOLLOWERS = frozenset(
    {
        *(
            "attention.cu",
            "experts.cu",
            "float_matvec.cu",
            "indexer.cu",
            "kquant_experts.cu",
        ),
        *("kquant_matvec.cu", "matvec.cu", "pooling.cu", "router.cu", "rows.cu", "streams.cu"),
    }
)
"""Files whose kernels wait by themselves for the one before (`let_follow` in common.cuh)."""

FOLLOWING_CAPABILITY = (9, 0)
"""From which on kernels can do so."""

MARKS = 64
"""How many points in the order of its work a GPU remembers."""

STAGED_BYTES = 4 << 20
"""Pinned memory that downloads go through: the GPU writes to it many times faster."""

SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel gets without being asked for."""


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise no_library(error) from None
    return driver


def _done(result: Any) -> Any:
    """Return what a call of the driver returned; raise GpuError if it failed."""
    status, *values = result
    if int(status) == OUT_OF_MEMORY:
        raise GpuMemoryError("the GPU has not enough free memory", hint="use a smaller --gpu-mem")
    if int(status) != 0:
        raise GpuError(f"the GPU failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def device_count() -> int:
    """Return how many GPUs there are; 0 without a driver. Raises GpuError without the library."""
    driver = _driver()
    try:
        _done(driver.cuInit(0))
        count: int = _done(driver.cuDeviceGetCount())
    except (GpuError, RuntimeError):  # no driver library, or one that finds no device
        return 0
    return count


class CudaGpu:
    """One CUDA device; see `gpu.Gpu` for what it does.

    `capability` is its compute capability, for instance (9, 0). Raises GpuError when there is no
    such device or it is too old.
    """

    def __init__(self, number: int = 0) -> None:
        self._driver = driver = _driver()
        count = device_count()
        if number >= count:
            raise GpuError(f"there is no CUDA device {number}: {count} found")
        self._device = _done(driver.cuDeviceGet(number))
        self.name = _done(driver.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        major = self._attribute("COMPUTE_CAPABILITY_MAJOR")
        self.capability = (major, self._attribute("COMPUTE_CAPABILITY_MINOR"))
        if 10 * self.capability[0] + self.capability[1] < OLDEST:
            raise GpuError(f"{self.name} is too old: compute capability {self.capability}")
        self._context = _done(driver.cuDevicePrimaryCtxRetain(self._device))
        self.make_current()
        self.total_bytes: int = _done(driver.cuMemGetInfo())[1]
        self._streams = [_done(driver.cuStreamCreate(1)) for _ in range(MOST_BRANCHES)]
        self._events = [_done(driver.cuEventCreate(2)) for _ in range(MOST_BRANCHES + 1)]
        self._marks = deque(_done(driver.cuEventCreate(2)) for _ in range(MARKS))
        self._asked = _done(driver.cuEventCreate(2))
        self._pinned, self._pinned_bytes = 0, 0
        self._stage = 0  # pinned memory for downloads, made when first wanted
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    def make_current(self) -> None:
        """Let the calling thread use this device."""
        _done(self._driver.cuCtxSetCurrent(self._context))

    def _attribute(self, name: str) -> int:
        key = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        value: int = _done(self._driver.cuDeviceGetAttribute(key, self._device))
        return value

    @property
    def arch(self) -> str:
        """The architecture that kernels are compiled for."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @cached_property
    def multiprocessors(self) -> int:
        """How many multiprocessors the GPU has."""
        return self._attribute("MULTIPROCESSOR_COUNT")

    def free_bytes(self) -> int:
        """Return how much memory nobody has taken."""
        free: int = _done(self._driver.cuMemGetInfo())[0]
        return free

    def allocate(self, nbytes: int) -> int:
        """Return the address of memory on a line of 256 bytes; raises GpuMemoryError."""
        return int(_done(self._driver.cuMemAlloc(max(1, nbytes))))

    def free(self, address: int) -> None:
        """Give memory back that `allocate` returned."""
        _done(self._driver.cuMemFree(address))

    def upload(self, address: int, host: int, nbytes: int) -> None:
        """Copy from host memory, which may be changed as soon as this returns."""
        _done(self._driver.cuMemcpyHtoDAsync(address, host, nbytes, self._streams[0]))

    def download(self, host: int, address: int, nbytes: int) -> None:
        """Copy to host memory; return when it is there."""
        driver = self._driver
        if not self._stage:
            self._stage = int(_done(driver.cuMemAllocHost(STAGED_BYTES)))
        for done in range(0, nbytes, STAGED_BYTES):
            part = min(STAGED_BYTES, nbytes - done)
            _done(driver.cuMemcpyDtoHAsync(self._stage, address + done, part, self._streams[0]))
            self.synchronize()
            ctypes.memmove(host + done, self._stage, part)

    def ask(self, requests: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
        """Enqueue copies (host, address, bytes) to host memory; return what waits for them."""
        driver, stream = self._driver, self._streams[0]
        total = sum(nbytes for _, _, nbytes in requests)
        if total > self._pinned_bytes:
            if self._pinned:
                _done(driver.cuMemFreeHost(self._pinned))
            self._pinned, self._pinned_bytes = int(_done(driver.cuMemAllocHost(total))), total
        at = self._pinned
        for _, address, nbytes in requests:
            _done(driver.cuMemcpyDtoHAsync(at, address, nbytes, stream))
            at += nbytes
        _done(driver.cuEventRecord(self._asked, stream))

        def wait() -> None:
            _done(driver.cuEventSynchronize(self._asked))
            source = self._pinned
            for host, _, nbytes in requests:
                ctypes.memmove(host, source, nbytes)
                source += nbytes

        return wait

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy inside the GPU."""
        _done(self._driver.cuMemcpyDtoDAsync(target, source, nbytes, self._streams[0]))

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        _done(self._driver.cuStreamSynchronize(self._streams[0]))

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Return what the GPU takes for work that is enqueued, the mean of some repeats."""
        driver, stream = self._driver, self._streams[0]
        start, end = _done(driver.cuEventCreate(0)), _done(driver.cuEventCreate(0))
        _done(driver.cuEventRecord(start, stream))
        for _ in range(repeats):
            work()
        _done(driver.cuEventRecord(end, stream))
        _done(driver.cuEventSynchronize(end))
        milliseconds: float = _done(driver.cuEventElapsedTime(start, end))
        for event in (start, end):
            _done(driver.cuEventDestroy(event))
        return milliseconds / 1e3 / repeats

    def mark(self) -> Mark:
        """Return the end of all that was enqueued so far, but for what lanes send.

        It is valid for MARKS more; after that it stands for a later one.
        """
        event = self._marks[0]
        self._marks.rotate(-1)
        _done(self._driver.cuEventRecord(event, self._streams[0]))
        return event

    def new_lane(self, nbytes: int) -> "CudaLane":
        """Return a pinned buffer for the thread that calls: it is copied beside everything else."""
        return CudaLane(self, nbytes)

    def make_ready(self, sources: Sequence[str], on_compile: OnCompile | None = None) -> None:
        """Compile files or texts of kernels that were never compiled for this kind of GPU."""
        new = [source for source in sources if source not in self._modules]
        compile_all(new, self.arch, on_compile)

    def run(self, steps: Sequence[Step]) -> None:
        """Enqueue launches, one step after the other."""
        for step in steps:
            for branch in step:
                for launch in branch:
                    self._launch(launch, self._streams[0])

    def record(self, steps: Sequence[Step]) -> Recording:
        """Keep launches for many runs, as a graph."""
        for step in steps:
            for branch in step:
                for launch in branch:
                    self._function(launch)  # loading code is not allowed while recording
        driver, main = self._driver, self._streams[0]
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _done(driver.cuStreamBeginCapture(main, mode))
        try:
            alone = False
            for step in steps:
                self._record_step(step, alone)
                alone = len(step) == 1
        finally:
            graph = _done(driver.cuStreamEndCapture(main))
        executable = _done(driver.cuGraphInstantiate(graph, 0))
        _done(driver.cuGraphDestroy(graph))
        return CudaGraph(lambda: _done(driver.cuGraphLaunch(executable, main)), executable)

    def _record_step(self, step: Step, follows: bool) -> None:
        """Fork into a stream for each branch, and join them.

        `follows`: nothing but the last launch of the main stream comes before this step.
        """
        driver, used = self._driver, self._streams[: len(step)]
        fork, *joins = self._events
        if len(step) > 1:
            _done(driver.cuEventRecord(fork, used[0]))
        for stream in used[1:]:
            _done(driver.cuStreamWaitEvent(stream, fork, 0))
        for number, branch in enumerate(step):
            for place, launch in enumerate(branch):
                self._launch(
                    launch, used[number % len(used)], place > 0 or (follows and not number)
                )
        for stream, event in zip(used[1:], joins, strict=False):
            _done(driver.cuEventRecord(event, stream))
            _done(driver.cuStreamWaitEvent(used[0], event, 0))

    def _launch(self, launch: Launch, stream: Any, follows: bool = False) -> None:
        """Enqueue a kernel; one that `follows` may start before the one before it has ended."""
        function = self._function(launch)
        words = (ctypes.c_int64 * len(launch.words))(*launch.words)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(words))
        can_follow = self.capability >= FOLLOWING_CAPABILITY
        waits = launch.kernel.source in FOLLOWERS or launch.kernel.name == merged.NAME
        if follows and can_follow and waits:
            config = self._following(launch, stream)
            _done(self._driver.cuLaunchKernelEx(config, function, ctypes.addressof(parameters), 0))
            return
        _done(
            self._driver.cuLaunchKernel(
                *(function, launch.blocks, 1, 1, launch.kernel.threads, 1, 1),
                *(launch.shared, stream, ctypes.addressof(parameters), 0),
            )
        )

    def _following(self, launch: Launch, stream: Any) -> Any:
        """Return the configuration of a launch that does not wait for the end of the last one."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _function(self, launch: Launch) -> Any:
        """Return the machine code of a kernel; compiled or loaded now if it was not yet."""
        kernel = launch.kernel
        key = (kernel.source, kernel.name)
        if key not in self._functions:
            if kernel.source not in self._modules:
                code = compiled(kernel.source, self.arch)
                self._modules[kernel.source] = _done(self._driver.cuModuleLoadData(code))
            module = self._modules[kernel.source]
            function = _done(self._driver.cuModuleGetFunction(module, kernel.name.encode()))
            self._allow_shared(function)
            self._functions[key] = function
        return self._functions[key]

    def _allow_shared(self, function: Any) -> None:
        """Let a kernel have as much shared memory as there is."""
        driver = self._driver
        attributes = driver.CUfunction_attribute
        used = _done(
            driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        )
        most = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN") - used
        if most > SHARED_BYTES - used:
            key = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver.cuFuncSetAttribute(function, key, most))

    def close(self) -> None:
        """Give back everything."""
        self._functions.clear()
        self._modules.clear()
        _done(self._driver.cuDevicePrimaryCtxRelease(self._device))


class CudaGraph:
    """A recorded graph of launches."""

    def __init__(self, launch: Callable[[], object], executable: Any) -> None:
        self._launch, self._executable = launch, executable

    def replay(self) -> None:
        """Enqueue all launches."""
        self._launch()


class CudaLane:
    """A pinned buffer with a stream of its own, for the one thread that made it."""

    def __init__(self, gpu: CudaGpu, nbytes: int) -> None:
        self._driver = driver = gpu._driver
        gpu.make_current()
        self._stream = _done(driver.cuStreamCreate(1))
        self.buffer = int(_done(driver.cuMemAllocHost(nbytes)))

    def follow(self, mark: Mark) -> None:
        """Let what is sent from now on wait for a mark."""
        _done(self._driver.cuStreamWaitEvent(self._stream, mark, 0))

    def send(self, address: int, nbytes: int) -> None:
        """Start to copy what is in the buffer."""
        _done(self._driver.cuMemcpyHtoDAsync(address, self.buffer, nbytes, self._stream))

    def wait(self) -> None:
        """Wait until the buffer has been sent."""
        _done(self._driver.cuStreamSynchronize(self._stream))

    def seconds(self, address: int, nbytes: int) -> float:
        """Return how long it takes to send so much of the buffer."""
        self.wait()
        start = time.perf_counter()
        self.send(address, nbytes)
        self.wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """Give the buffer and the stream back."""
        _done(self._driver.cuMemFreeHost(self.buffer))
        _done(self._driver.cuStreamDestroy(self._stream))
