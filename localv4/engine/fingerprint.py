"""What tells one model from another, and one way of computing from another.

Reading all bytes of 150 GB of weights to name them would take minutes. Two releases of a model have
the same names and shapes but differ in every matrix, so some bytes of each are enough.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import localv4
from localv4.engine.session import Network
from localv4.kernels.isa import ISA
from localv4.storage import Checkpoint

SAMPLE_BYTES = 256
MOST_EXPERT_SAMPLES = 256
"""Matrices of experts are many and lie far apart on the disk: some of them stand for all."""

ARITHMETIC_PACKAGES = ("kernels", "model")
"""Whose sources decide about the bits of a result."""

_known: WeakKeyDictionary[Checkpoint, str] = WeakKeyDictionary()


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """Return 64 hexadecimal digits that tell the weights of models apart, wherever they lie.

    They come from names, types and shapes of all tensors and a sample from the middle of each,
    which are read once for each opened checkpoint.
    """
    found = _known.get(checkpoint)
    if found is None:
        found = _known[checkpoint] = _digest_of_samples(checkpoint)
    return found


def _digest_of_samples(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    tensors = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    lines = [f"{tensor.name} {tensor.dtype.name} {tensor.shape}" for tensor in tensors]
    digest.update("\n".join(lines).encode("utf-8", "surrogatepass"))
    experts = [tensor for tensor in tensors if "exp" in tensor.name]
    step = max(1, len(experts) // MOST_EXPERT_SAMPLES)
    for tensor in [tensor for tensor in tensors if "exp" not in tensor.name] + experts[::step]:
        middle = tensor.nbytes // 2
        digest.update(checkpoint.bytes(tensor.name)[middle : middle + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


def arithmetic_fingerprint(checkpoint: Checkpoint, network: Network) -> str:
    """Return 64 hexadecimal digits that are equal only where equal tokens give equal bits.

    Beside the weights they tell the configuration, the numeric mode, the format of compressed
    rows, the sources of the network and its kernels, the compiler and the processor; and the times
    of the weight files, since a change in a few bytes would escape the samples.
    """
    facts = [
        weights_fingerprint(checkpoint),
        repr(network.config),
        f"{network.name} {network.rows.name}",
        repr(ISA),
        platform.machine(),
        *(f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy")),
        *(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in checkpoint.files),
    ]
    digest = hashlib.sha256("\n".join(facts).encode())
    package = Path(localv4.__file__).parent
    for folder in ARITHMETIC_PACKAGES:
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()
