"""Real servers on one GPU: stock SGLang, prefill, and decode servers of any number of ranks.

All of a model's servers are started at once, since most of a start is imports and just-in-time compilation. Two ranks
on one GPU are two "nodes" whose collectives run over gloo (``one_gpu/``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.e2e.servers import COMMON, ROOT, Pair, Server, free_ports, launcher

# Without a GPU the CPU platform serves: to try the tests themselves.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
START_S = 420.0
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
    "SGLANG_NCCL_SO_PATH": "no-nccl-on-one-gpu",  # NCCL refuses two ranks on one device
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
}
# A dozen schedulers that spin while they are idle would leave no core to those that work.
SERVER = (
    "--grammar-backend",
    "none",
    "--sampling-backend",
    "pytorch",
    "--skip-server-warmup",
    "--sleep-on-idle",
)
CUDA = (
    "--device", "cuda", "--dtype", "bfloat16", "--host", "127.0.0.1", "--max-total-tokens", "70000",
    "--disable-custom-all-reduce",
)  # fmt: skip
if DEVICE == "cuda":
    SHARED_FLAGS = (*CUDA, *SERVER)
    # Of the stock backends, Triton computes prompts of any shape and compiles in seconds; for decode at the widths of
    # the test models (128 + 32, 256 + 64) it does not compile, FlashInfer faults, and PyTorch's own attention is right.
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


def _ours(role: str, name: str, model: str, port: int, log: Path, *args: str, **env: str) -> Server:
    server = launcher(role, model, port, log / f"{name}.log")
    flags = server.command[: server.command.index("--device")]
    command = (*flags, *SHARED_FLAGS, "--port", str(port), *args)
    return Server(name, command, port, log / f"{name}.log", ENV | env)


@dataclass
class Decode:
    """A decode server: rank 0 answers, the others are nodes of their own."""

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
    bootstrap: int = 0
    decodes: dict[str, Decode] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _rooms: int = 1000

    def start_stock(self, *extra: str) -> None:
        """Start SGLang with no plug-in."""
        (port,) = free_ports(1)
        command = (
            "-m",
            "sglang.launch_server",
            "--model-path",
            self.model,
            *SHARED_FLAGS,
            "--port",
            str(port),
        )
        env = ENV | {"SGLANG_PLUGINS": "none"} | (CPU_ENV if DEVICE == "cpu" else {})
        self.stock = Server("stock", (*command, *PROMPTS, *extra), port, self.log / "stock.log", env).start()

    def start_prefill(self, *extra: str) -> None:
        """Start a prefill server."""
        port, self.bootstrap = free_ports(2)
        flags = ("--disaggregation-bootstrap-port", str(self.bootstrap), *PROMPTS, *extra)
        self.prefill = _ours("prefill", "prefill", self.model, port, self.log, *flags).start()

    def decode(self, name: str, ranks: int, *args: str) -> None:
        """Start a decode server of ``ranks`` ranks on the one GPU; no CUDA graphs with more than one."""
        ports = free_ports(ranks + 1)
        servers = []
        for rank in range(ranks):
            nodes = (
                "--tp", str(ranks), "--nnodes", str(ranks), "--node-rank", str(rank),
                "--dist-init-addr", f"127.0.0.1:{ports[-1]}",
            )  # fmt: skip
            env = {"ONE_GPU": "gloo"} if DEVICE == "cuda" else {}
            path = os.pathsep.join(filter(None, [ONE_GPU, os.environ.get("PYTHONPATH")]))
            servers.append(
                _ours(
                    "decode", f"{name}-{rank}" if ranks > 1 else name, self.model, ports[rank], self.log,
                    *args, *((*nodes, *EAGER) if ranks > 1 else ()),
                    **((env | {"PYTHONPATH": path}) if ranks > 1 else {}),
                ).start()
            )  # fmt: skip
        self.decodes[name] = Decode(servers)

    def wait(self, *servers: Server) -> None:
        """Until the servers answer; once for each."""
        for server in servers:
            if server.name not in self._ready:
                server.wait(timeout_s=START_S)
                self._ready.add(server.name)

    def pair(self, name: str) -> Pair:
        """Prefill and a decode server, both up."""
        decode = self.decodes[name]
        assert self.prefill is not None
        self.wait(self.prefill, *decode.ranks)
        self._rooms += 1000
        return Pair(self.prefill, self.bootstrap, decode.front, next_room=self._rooms)

    def servers(self) -> Sequence[Server]:
        front = [server for server in (self.stock, self.prefill) if server is not None]
        return [*front, *(server for decode in self.decodes.values() for server in decode.ranks)]

    def stop(self) -> None:
        for server in self.servers():
            server.stop()
