"""The attention backends of SGLang that may decode a slice, as measured (``sglang_tpla/attention/backends.py``).

SGLang's names are not those of kernels: its ``flashinfer`` lets FlashInfer choose a template by the GPU, its ``fa3`` is
the FlashAttention-3 of sgl_kernel, which takes value widths of 256 and more, and ``tpla`` is this package's kernel
(``host/attention/backend.py``). This module needs neither SGLang nor a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace

from sglang_tpla.attention.backends import BACKENDS, BackendRefusal, Capability
from sglang_tpla.attention.interface import DecodeShape

OURS = "tpla"
FA3_WIDTHS = (256, 320, 512)  # measured right on an H200; the kernel refuses widths below 256


def triton_serves(latent_dim: int, rope_dim: int) -> bool:
    """Return whether SGLang's Triton decode compiles: key and value columns must form blocks of one size.

    The rule follows ``_decode_grouped_att_m_fwd`` in ``sglang/kernels/ops/attention/decode_attention.py``, which splits
    off the rope only for 512 + 64 and 256 + 32. On an H200, 80 + 32 was right, and the compiler refused 128 + 32 and
    256 + 64 at the first step.
    """

    def rounded(values: int) -> int:
        return 1 << (values - 1).bit_length()

    keys = {576: 512, 288: 256}.get(latent_dim + rope_dim, rounded(latent_dim + rope_dim))
    return keys == rounded(latent_dim)


def engine_unsupported_reason(name: str, shape: DecodeShape, capability: Capability) -> str | None:
    """Return the reason why an attention backend of the engine must not decode this shape there, or None if it may.

    Args:
        name: value of ``--attention-backend`` (or ``--decode-attention-backend``).
        shape: one rank's attention layer.
        capability: CUDA compute capability, None on a CPU.
    """
    kernels = {backend.name: backend for backend in BACKENDS}
    if shape.kind != "plain":
        if name != OURS:
            return "it does not read the rows of --tpla-rows sketched"
        readers = [backend for backend in BACKENDS if backend.rows == shape.kind]
        reasons = [backend.unsupported_reason(replace(shape, page_size=1), capability) for backend in readers]
        return None if None in reasons else reasons[0]
    if name == "torch_native":
        return None
    if name == "triton":
        if capability is None:
            return "Triton needs a GPU"
        if triton_serves(shape.latent_dim, shape.rope_dim):
            return None
        return (
            "its kernel takes the values from the loaded keys, which compiles only where latent and latent + rope "
            "round up to the same power of two"
        )
    if name == "flashinfer":
        return kernels["flashinfer_fa3" if capability == (9, 0) else "flashinfer_fa2"].unsupported_reason(
            shape, capability
        )
    if name == OURS:  # our kernel gathers single tokens, whatever the page size of the pool
        kernel = kernels["reference" if capability is None else "hopper"]
        return kernel.unsupported_reason(replace(shape, page_size=1), capability)
    if name == "fa3":
        if capability != (9, 0) or shape.latent_dim not in FA3_WIDTHS:
            return f"it serves latent widths {list(FA3_WIDTHS)} on compute capability 9.0"
        return None
    return "it was never measured on a sliced latent"


def require_engine_backend(name: str, shape: DecodeShape, capability: Capability) -> None:
    """Refuse an attention backend of the engine that is wrong, crashes or was never measured at this shape.

    Raises:
        BackendRefusal: with the reason and with the backends to use instead.
    """
    reason = engine_unsupported_reason(name, shape, capability)
    if reason is not None:
        able = [
            backend
            for backend in (OURS, "fa3", "flashinfer", "triton", "torch_native")
            if engine_unsupported_reason(backend, shape, capability) is None
        ]
        other = "an artifact of another width" if shape.kind == "plain" else "plain rows (an artifact of --rows plain)"
        raise BackendRefusal(
            f"--attention-backend {name} cannot decode a latent slice of width {shape.latent_dim} with rope "
            f"{shape.rope_dim} and {shape.heads} heads here: {reason}; "
            + (f"use --attention-backend {' or '.join(able)}, or {other}" if able else f"use {other}")
        )


def preferred_backend(shapes: Sequence[DecodeShape], capability: Capability, stock: str) -> str:
    """Return the backend of a decode server whose flags name none: SGLang's own choice where that is right.

    Args:
        shapes: one for each width among the layers.
        stock: SGLang's choice on this machine, for the whole latent.
    """
    for name in (stock, OURS, "triton"):
        if all(engine_unsupported_reason(name, shape, capability) is None for shape in shapes):
            return name
    # PyTorch takes every width of plain rows; for other rows, our backend is refused at start with the reason.
    return "torch_native" if all(shape.kind == "plain" for shape in shapes) else OURS
