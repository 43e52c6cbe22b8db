"""The device: which one, what a CPU needs to be fast, its random state, and one update as a CUDA
graph."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common import InputError


def pick_device(args) -> torch.device:
    """--device as torch understands it; `auto` is CUDA where there is one. The process takes
    --threads of the CPU; there it keeps the memory that it frees and takes the faster matrix
    products.

    Raises:
        InputError: there is no CUDA device.
    """
    threads = getattr(args, "threads", None)  # benchmarks have no such argument
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)
    has_cuda = torch.cuda.is_available()
    name = args.device if args.device != "auto" else "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise InputError("--device cuda: no CUDA device is available; use --device cpu or auto")
    if name == "cpu":
        keep_freed_memory()
        multiply_by_onednn()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Keep it for reuse, with glibc: otherwise every tensor of more than 32 MiB is mapped and its
    pages are cleared anew at each update."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def multiply_by_onednn() -> None:
    """Matrix products by oneDNN in place of MKL, on AMD's processors with AVX-512, which MKL leaves
    unused there: those of a million multiplications take half the time, very small ones longer.

    torch asks oneDNN for float32 only where it may round to bfloat16, so it may; and oneDNN is kept
    to instructions that cannot. Where it rounds all the same, since it was at work before, all is
    as it was.
    """
    cpu = Path("/proc/cpuinfo")
    is_amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    if is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # read at its first primitive
        matmul = torch.backends.mkldnn.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        x = torch.full((64, 64), 1 + 2**-12)  # bfloat16 takes it for 1
        if not torch.equal(x @ torch.eye(64), x):
            matmul.fp32_precision = before


def get_rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's default generators, the only source of randomness besides the
    environments' seeds."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `get_rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def kept_rng_state(device: torch.device) -> Iterator[None]:
    """Draws inside leave the generators as they were."""
    state = get_rng_state(device)
    yield
    set_rng_state(state, device)


class Graphed:
    """Calls a function once per update: as it is, or as a captured CUDA graph.

    The function must read and write tensors that stay where they are and never wait for the host.
    Its first calls run eagerly on a side stream, as capture demands; they are calls like any other,
    so nothing has to be undone.

    Args:
        function: called without arguments, or with the update's kind.
        enabled: capture it.
        kind_of: for updates of several kinds, such as those of a delayed actor: from the update's
            number to its kind. Each kind has its own graph.
    """

    def __init__(self, function: Callable, enabled: bool, kind_of: Callable | None = None):
        self.function, self.kind_of = function, kind_of
        self.warm_ups_left, self.graphs, self.outputs = {}, {}, {}
        self.stream = torch.cuda.Stream() if enabled else None

    def __call__(self, number: int):
        """Make update `number` and return what the function returned."""
        kind = () if self.kind_of is None else (self.kind_of(number),)
        if self.stream is None:
            return self.function(*kind)
        left = self.warm_ups_left.get(kind, 3)
        if left > 0:
            self.warm_ups_left[kind] = left - 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function(*kind)
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if kind not in self.graphs:
            self.graphs[kind] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[kind], stream=self.stream):
                self.outputs[kind] = self.function(*kind)
            # torch begins a capture by setting the generator's offset to 0 there, and a replay by
            # setting it here: the first of the two must not come last
            torch.cuda.current_stream().wait_stream(self.stream)
        self.graphs[kind].replay()
        return self.outputs[kind]
