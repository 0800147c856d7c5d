"""The table of backends: its choices, and its refusals with their words."""

import pytest
import torch

from sglang_tpla.attention.backends import BACKENDS, BackendRefusal, choose, device_capability, require
from sglang_tpla.attention.interface import DecodeShape

HOPPER, AMPERE, CPU = (9, 0), (8, 0), None


@pytest.mark.parametrize("latent_dim", range(64, 513, 32))
def test_hopper_serves_every_width(latent_dim: int) -> None:
    expected = "flashinfer_fa3" if latent_dim == 512 else "hopper"
    assert choose(DecodeShape(latent_dim, 32), HOPPER) == expected


@pytest.mark.parametrize("latent_dim", [1, 60, 80, 88, 512])
def test_a_cpu_has_the_reference_for_any_width(latent_dim: int) -> None:
    assert choose(DecodeShape(latent_dim, 3, rope_dim=32, page_size=4, dtype=torch.float32), CPU) == "reference"


@pytest.mark.parametrize("latent_dim", [64, 192, 320, 96, 224, 384])
def test_fa2_is_refused_where_it_computes_wrong(latent_dim: int) -> None:
    shape = DecodeShape(latent_dim, 64)
    with pytest.raises(BackendRefusal, match=f"width {latent_dim} .*silently computes wrong.*use 'hopper'"):
        require("flashinfer_fa2", shape, HOPPER)
    with pytest.raises(BackendRefusal, match="no attention backend serves"):
        choose(shape, AMPERE)


@pytest.mark.parametrize("latent_dim", [64, 128, 192, 256, 320])
def test_fa3_is_refused_off_512(latent_dim: int) -> None:
    with pytest.raises(BackendRefusal, match="faults or does not compile"):
        require("flashinfer_fa3", DecodeShape(latent_dim, 32), HOPPER)


@pytest.mark.parametrize(
    ("shape", "capability", "words"),
    [
        (DecodeShape(80, 32), HOPPER, "pad the slice"),
        (DecodeShape(544, 32), HOPPER, "multiples of 32 from 64 to 512"),
        (DecodeShape(256, 4), HOPPER, "4 heads are outside of 8 to 128"),
        (DecodeShape(256, 32, rope_dim=32), HOPPER, "rope width 32"),
        (DecodeShape(256, 32, dtype=torch.float16), HOPPER, "dtype torch.float16"),
        (DecodeShape(256, 32, page_size=16), HOPPER, "page size 16"),
        (DecodeShape(256, 32), AMPERE, "needs compute capability 9.0.*8.0"),
        (DecodeShape(256, 32), (10, 0), "needs compute capability 9.0"),
        (DecodeShape(256, 32), CPU, "this is a CPU.*use 'reference'"),
    ],
)
def test_the_kernel_says_why_not(shape: DecodeShape, capability: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(BackendRefusal, match=words):
        require("hopper", shape, capability)


def test_choice_and_requirement_agree() -> None:
    """``require`` accepts each choice of ``choose``, and every backend refuses a shape that ``choose`` refuses."""
    for latent_dim in (48, 64, 128, 192, 256, 512, 640):
        for heads in (1, 8, 128, 256):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for capability in (HOPPER, AMPERE, (7, 5), CPU):
                    shape = DecodeShape(latent_dim, heads, dtype=dtype)
                    try:
                        require(choose(shape, capability), shape, capability)
                    except BackendRefusal:
                        assert all(backend.unsupported_reason(shape, capability) for backend in BACKENDS)


def test_unknown_name_and_cpu_device() -> None:
    with pytest.raises(BackendRefusal, match=r"must be one of.*got 'triton'"):
        require("triton", DecodeShape(256, 32), HOPPER)
    assert device_capability(torch.device("cpu")) is None
