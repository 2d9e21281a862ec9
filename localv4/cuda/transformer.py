"""The network in the arithmetic `fast`, computed by a GPU with the help of the host."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Gpu
from localv4.cuda.network import GpuNetwork, MakeStore
from localv4.cuda.rows_plan import GpuRowsPlan
from localv4.cuda.token_plan import GpuTokenPlan
from localv4.cuda.vram_store import VramStore
from localv4.kernels import row_operations
from localv4.kernels.gemm import BATCH_TOKENS
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.fast import CHUNK_TOKENS, HEAD_TOKENS, SLACK_TOKENS, FastTransformer
from localv4.model.fast_chunk import ChunkPlan
from localv4.model.matrix import Floats
from localv4.model.program import Rounded, Rows
from localv4.model.state import State
from localv4.model.weights import Weights
