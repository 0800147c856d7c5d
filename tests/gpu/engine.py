"""Real servers on GPUs: stock SGLang, prefill, decode servers of any number of ranks, and the router.

All of a model's servers start at once, since most of the start-up time is imports and just-in-time compilation. If
there are as many GPUs as ranks, each rank has a GPU and the ranks use NCCL and CUDA graphs; on one GPU, two ranks are
two "nodes" whose collectives run over gloo (``one_gpu/``).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.e2e.servers import COMMON, ROOT, Server, ServerFailed, launcher, router
from tests.e2e.traffic import Pair
from tests.ports import free_ports

# Without a GPU the servers run on the CPU platform, to try the tests themselves.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPUS = torch.cuda.device_count()
START_S = float(os.environ.get("TEST_START_S", "420"))
ONE_GPU = str(ROOT / "tests" / "gpu" / "one_gpu")
CPU_ENV = {
    "SGLANG_PLATFORM": "sglang_tpla_cpu",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
}
ENV = {
    "SGLANG_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # other servers' memory is on the same GPUs
    # NVLink multicast can make a host's GPUs unusable for others, so nothing here may use it.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
# NCCL refuses two ranks on one device.
GLOO_ENV = {"ONE_GPU": "gloo", "SGLANG_NCCL_SO_PATH": "no-nccl-on-one-gpu"}
# A dozen schedulers that spin while idle would leave no core for those that work.
SERVER = ("--grammar-backend", "none", "--sampling-backend", "pytorch", "--skip-server-warmup", "--sleep-on-idle")
CUDA = (
    "--device", "cuda", "--dtype", "bfloat16", "--max-total-tokens", "70000", "--disable-custom-all-reduce",
    "--enforce-disable-flashinfer-allreduce-fusion",
)  # fmt: skip
if DEVICE == "cuda":
    SHARED_FLAGS = (*CUDA, *SERVER)
    # Triton computes prompts of any shape and compiles in seconds. For decode at the widths of the test models
    # (128 + 32, 256 + 64), Triton does not compile, FlashInfer faults, and PyTorch's own attention is right.
    PROMPT_ATTENTION = ("--attention-backend", "triton", "--decode-attention-backend", "torch_native")
    EAGER: tuple[str, ...] = ("--disable-decode-cuda-graph",)
    GRAPHS: tuple[str, ...] = ("--cuda-graph-max-bs-decode", "8")
    ANY_WIDTH: tuple[str, ...] = ("--attention-backend", "torch_native", *EAGER)
    OUR_KERNEL: tuple[str, ...] = ("--attention-backend", "tpla", *GRAPHS)
    NO_GRAPHS: tuple[str, ...] = ("--disable-prefill-cuda-graph", *EAGER)
else:
    SHARED_FLAGS = (*COMMON, *SERVER)
    PROMPT_ATTENTION = ("--attention-backend", "torch_native")
    EAGER, ANY_WIDTH, OUR_KERNEL, NO_GRAPHS = (), (), (), ()
PROMPTS = (*PROMPT_ATTENTION, *NO_GRAPHS)


def _ours(role: str, name: str, model: str, log: Path, *args: str) -> Server:
    server = launcher(role, model, log / f"{name}.log", *args, common=SHARED_FLAGS)
    server.name = name
    server.env |= ENV
    return server


@dataclass
class Decode:
    """A decode server: rank 0 answers; the other ranks may be separate nodes."""

    ranks: list[Server]

    @property
    def front(self) -> Server:
        return self.ranks[0]


@dataclass
class Engines:
    """A model's servers, by name.

    Args:
        model: checkpoint folder. log: folder of the logs.
    """

    model: str
    log: Path
    stock: Server | None = None
    prefill: Server | None = None
    decodes: dict[str, Decode] = field(default_factory=dict)
    routers: list[Server] = field(default_factory=list)
    _ready: set[str] = field(default_factory=set)

    def start_stock(self, *extra: str) -> None:
        """Start SGLang with no plug-in."""
        (port,) = free_ports(1)
        command = ("-m", "sglang.launch_server", "--model-path", self.model, *SHARED_FLAGS, "--port", str(port))
        env = ENV | {"SGLANG_PLUGINS": "none"} | (CPU_ENV if DEVICE == "cpu" else {})
        flags = (*PROMPTS, *self._place(1), *extra)
        self.stock = Server("stock", (*command, *flags), port, self.log / "stock.log", env).start()

    def start_prefill(self, *extra: str, prompts: Sequence[str] = PROMPTS) -> None:
        """Start a prefill server; ``prompts`` are the flags for its prompt attention."""
        flags = (*prompts, *self._place(1), *extra)
        self.prefill = _ours("prefill", "prefill", self.model, self.log, *flags).start()

    def decode(self, name: str, ranks: int, *args: str) -> None:
        """Start a decode server of ``ranks`` ranks."""
        if DEVICE == "cuda" and ranks > GPUS:
            self._decode_on_one_gpu(name, ranks, *args)
            return
        flags = (*self._place(ranks), "--tp", str(ranks), *args)
        self.decodes[name] = Decode([_ours("decode", name, self.model, self.log, *flags).start()])

    def _decode_on_one_gpu(self, name: str, ranks: int, *args: str) -> None:
        """Start the ranks as nodes, without CUDA graphs."""
        (meeting,) = free_ports(1)
        path = os.pathsep.join(filter(None, [ONE_GPU, os.environ.get("PYTHONPATH")]))
        servers = []
        for rank in range(ranks):
            nodes = (
                "--tp", str(ranks), "--nnodes", str(ranks), "--node-rank", str(rank),
                "--dist-init-addr", f"127.0.0.1:{meeting}",
            )  # fmt: skip
            flags = (*args, *nodes, *EAGER)
            server = _ours("decode", f"{name}-{rank}", self.model, self.log, *flags)
            server.env |= GLOO_ENV | {"PYTHONPATH": path}
            servers.append(server.start())
        self.decodes[name] = Decode(servers)

    def _place(self, ranks: int) -> tuple[str, ...]:
        """Return the flags for a server's GPUs: several ranks start at the first GPU, a single rank has the last."""
        if DEVICE == "cpu":
            return ()
        return ("--base-gpu-id", str(0 if ranks > 1 else GPUS - 1))

    def start_router(self, name: str) -> Server:
        """Start a router in front of the running prefill server and a running decode server."""
        assert self.prefill is not None
        server = router(self.log / f"router-{name}.log", self.prefill, self.decodes[name].front)
        self.routers.append(server.start())
        return server.wait(timeout_s=60)

    def wait(self, *servers: Server) -> None:
        """Wait once for each of the servers, until it answers."""
        for server in servers:
            if server.name not in self._ready:
                try:
                    server.wait(timeout_s=START_S)
                except ServerFailed as failed:  # another server is often the reason
                    tails = [f"--- {one.name}\n{one.tail(15)}" for one in self.servers() if one is not server]
                    raise ServerFailed("\n".join([str(failed), *tails])) from None
                self._ready.add(server.name)

    def pair(self, name: str) -> Pair:
        """Return prefill and a decode server once both answer."""
        decode = self.decodes[name]
        assert self.prefill is not None
        self.wait(self.prefill, *decode.ranks)
        return Pair(self.prefill, decode.front)

    def servers(self) -> Sequence[Server]:
        front = [*self.routers, *(server for server in (self.stock, self.prefill) if server is not None)]
        return [*front, *(server for decode in self.decodes.values() for server in decode.ranks)]

    def stop(self) -> None:
        for server in self.servers():
            server.stop()
