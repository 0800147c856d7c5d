"""The table of attention backends and the shapes that each serves; every other shape is refused. Needs no GPU.

A backend is listed only for shapes on which it was measured to be right (relative error against float32 under
3e-3, on an H200). FlashInfer 0.6.15's fa2 template silently computes wrong numbers at widths 64, 192 and 320; its fa3
template faults at 256, 128 and 64 and does not compile at 192 and 320.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_tpla.attention.hopper import sketched
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

Capability = tuple[int, int] | None  # CUDA compute capability; None is a CPU


class BackendRefusal(AttentionInputError):
    """The chosen backend, or every backend, would compute a shape wrong or not at all."""


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Args:
        name: the backend's name.
        widths: the widths as text for messages. has_width: returns whether the backend serves a w.
        dtypes, page_sizes (None: any), heads (lowest, highest): what the backend serves.
        device: the device as text for messages. has_device: returns whether the backend serves a capability.
        why_not: why other widths are refused.
        rows: the kind of rows that the backend reads (`DecodeShape.kind`).
        other: a further check of sketched rows; it returns the reason for refusing them, or None.
    """

    name: str
    widths: str
    has_width: Callable[[int], bool]
    dtypes: tuple[torch.dtype, ...]
    page_sizes: tuple[int, ...] | None
    heads: tuple[int, int]
    device: str
    has_device: Callable[[Capability], bool]
    why_not: str
    rope_dims: tuple[int, ...] | None = (64,)
    rows: str = "plain"
    other: Callable[[SketchedRows], str | None] = lambda rows: None

    def unsupported_reason(self, shape: DecodeShape, capability: Capability) -> str | None:
        """Return why this backend must not serve ``shape`` on such a device, or None if it may."""
        if not self.has_device(capability):
            return f"it needs {self.device}, this is {_device_text(capability)}"
        if self.rows != shape.kind:
            return f"it reads {self.rows} rows"
        if not self.has_width(shape.latent_dim):
            return f"latent width {shape.latent_dim} is not among its widths ({self.widths}): {self.why_not}"
        if self.rope_dims is not None and shape.rope_dim not in self.rope_dims:
            return f"rope width {shape.rope_dim} is not among {list(self.rope_dims)}"
        if shape.dtype not in self.dtypes:
            return f"dtype {shape.dtype} is not among {[str(dtype) for dtype in self.dtypes]}"
        if self.page_sizes is not None and shape.page_size not in self.page_sizes:
            return f"page size {shape.page_size} is not among {list(self.page_sizes)}"
        if not self.heads[0] <= shape.heads <= self.heads[1]:
            return f"{shape.heads} heads are outside of {self.heads[0]} to {self.heads[1]}"
        return None if shape.sketched is None else self.other(shape.sketched)


def _device_text(capability: Capability) -> str:
    return "a CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"


def _reference(name: str, rows: str, *dtypes: torch.dtype) -> Backend:
    return Backend(
        name=name,
        widths="any",
        has_width=lambda w: True,
        dtypes=(torch.float32, torch.bfloat16, torch.float16, *dtypes),
        page_sizes=None,
        heads=(1, 1 << 16),
        device="a CPU (on a GPU it is for tests only)",
        has_device=lambda capability: capability is None,
        why_not="",
        rope_dims=None,
        rows=rows,
    )


# Backends are listed in order of preference: FlashInfer comes first wherever it is right and as fast.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="flashinfer_fa3",
        widths="512",
        has_width=lambda w: w == 512,
        dtypes=(torch.bfloat16, torch.float16),
        page_sizes=None,
        heads=(1, 128),
        device="compute capability 9.0",
        has_device=lambda capability: capability == (9, 0),
        why_not="FlashInfer's fa3 template faults or does not compile at other widths",
    ),
    Backend(
        name="hopper",
        widths="multiples of 32 from 64 to 512",
        has_width=lambda w: 64 <= w <= 512 and w % 32 == 0,
        dtypes=(torch.bfloat16,),
        page_sizes=(1, 64),
        heads=(8, 128),
        device="compute capability 9.0",
        has_device=lambda capability: capability == (9, 0),
        why_not="its tiles are multiples of 32 columns; pad the slice (zero columns) to the next multiple",
    ),
    Backend(
        name="flashinfer_fa2",
        widths="128, 256, 512",
        has_width=lambda w: w in (128, 256, 512),
        dtypes=(torch.bfloat16, torch.float16),
        page_sizes=None,
        heads=(1, 128),
        device="compute capability 8.0 or higher",
        has_device=lambda capability: capability is not None and capability >= (8, 0),
        why_not="FlashInfer's fa2 template silently computes wrong numbers at 64, 192 and 320, "
        "and no other was measured",
    ),
    _reference("reference", "plain", torch.float64),
    Backend(
        name="hopper_sketched",
        widths="multiples of 16 from 64 to 512",
        has_width=lambda w: 64 <= w <= 512 and w % 16 == 0,
        dtypes=(torch.bfloat16,),
        page_sizes=None,
        heads=(1, 128),
        device="compute capability 9.0",
        has_device=lambda capability: capability == (9, 0),
        why_not="its tiles are multiples of 16 columns",
        rows="sketched",
        other=sketched.unsupported_reason,
    ),
    _reference("sketched_reference", "sketched"),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def device_capability(device: torch.device) -> Capability:
    """Return the compute capability of a CUDA device; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def require(name: str, shape: DecodeShape, capability: Capability) -> None:
    """Refuse a backend that would compute ``shape`` wrong or not at all.

    Raises:
        BackendRefusal: the message gives the reason and the backend to use instead.
    """
    if name not in _BY_NAME:
        raise BackendRefusal(f"attention backend must be one of {sorted(_BY_NAME)}; got {name!r}")
    reason = _BY_NAME[name].unsupported_reason(shape, capability)
    if reason is not None:
        able = [b.name for b in BACKENDS if b.unsupported_reason(shape, capability) is None]
        advice = f"use {able[0]!r}" if able else "change the width (groups, shared dims), the dtype or the device"
        raise BackendRefusal(f"attention backend {name!r} cannot serve {shape}: {reason}; {advice}")


def choose(shape: DecodeShape, capability: Capability) -> str:
    """Return the first backend of the table that serves ``shape``.

    Raises:
        BackendRefusal: no backend serves ``shape``; the message gives every backend's reason.
    """
    reasons = []
    for backend in BACKENDS:
        reason = backend.unsupported_reason(shape, capability)
        if reason is None:
            return backend.name
        reasons.append(f"{backend.name}: {reason}")
    raise BackendRefusal(f"no attention backend serves {shape}: " + "; ".join(reasons))
