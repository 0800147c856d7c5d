"""For the same memory a decode rank at g = 2 holds 1.8 times the tokens: real servers, DeepSeek's 512 + 64 latent."""

from pathlib import Path

import pytest
from v3_shaped import Shape, write_artifact, write_checkpoint

from tests.e2e.servers import COMMON, launcher, running


def capacity(model: Path, log: Path, *args: str) -> tuple[int, int]:
    """Return the number of tokens that a decode server reports to hold, and its cache bytes a token on one rank."""
    common = [arg for arg in COMMON if arg not in ("--max-total-tokens", "20000")]
    size = ("--tp", "2", "--mem-fraction-static", "0.8", "--context-length", "4096")
    server = launcher("decode", model, log, *size, *args, common=common)
    server.env["SGLANG_TPLA_CPU_MEMORY_BYTES"] = str(4 << 30)
    with running(server):
        info = server.get("/server_info")
        return info["max_total_num_tokens"], info["tpla"]["cache_bytes_per_token_and_rank"]


def test_tokens_for_the_same_memory(tmp_path: Path, logs: Path) -> None:
    model, artifact = tmp_path / "wide", tmp_path / "wide-g2.safetensors"
    write_checkpoint(model, Shape(layers=2, context=4096, heads=4, hidden=128, query_latent=64, intermediate=256))
    write_artifact(artifact, model, 2)
    whole, whole_bytes = capacity(model, logs / "wide-g1.log", "--tpla-groups", "1")
    two = ("--tpla-groups", "2", "--tpla-artifact", str(artifact))
    half, half_bytes = capacity(model, logs / "wide-g2.log", *two)
    assert whole_bytes / half_bytes == pytest.approx(1.8)
    # A rank has 4 GiB for everything; the memory of the process itself varies a little from start to start.
    assert half / whole == pytest.approx(1.8, rel=0.03)
