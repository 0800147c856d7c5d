"""Which of SGLang's attention backends may decode a slice, as measured (``sglang_tpla/attention/backends.py``).

SGLang's names differ from kernels: its ``flashinfer`` backend lets FlashInfer choose a template by the GPU, its ``fa3``
is the FlashAttention-3 of sgl_kernel, which takes value widths of 256 and more.
"""

from __future__ import annotations

from sglang_tpla.attention.backends import BACKENDS, BackendRefusal, Capability
from sglang_tpla.attention.interface import DecodeShape

FA3_WIDTHS = (256, 320, 512)  # measured right on an H200; below 256 the kernel refuses


def require_engine_backend(name: str, shape: DecodeShape, capability: Capability) -> None:
    """Refuse an attention backend of the engine that is wrong, faults or was never measured at this shape.

    Args:
        name: value of ``--attention-backend`` (or ``--decode-attention-backend``).
        shape: one rank's attention layer.
        capability: CUDA compute capability, None on a CPU.

    Raises:
        BackendRefusal: with the reason and what to use instead.
    """
    if name == "torch_native":
        return
    if name == "flashinfer":
        kernel = "flashinfer_fa3" if capability == (9, 0) else "flashinfer_fa2"
        objection = next(b for b in BACKENDS if b.name == kernel).objection(shape, capability)
        if objection is not None:
            raise BackendRefusal(
                f"--attention-backend flashinfer cannot decode a latent slice of width {shape.latent_dim} here: "
                f"{objection}; use --attention-backend torch_native (any width), or an artifact of another width"
            )
    elif name == "fa3":
        if capability != (9, 0) or shape.latent_dim not in FA3_WIDTHS:
            raise BackendRefusal(
                f"attention backend 'fa3' serves latent widths {list(FA3_WIDTHS)} on compute capability 9.0; got "
                f"width {shape.latent_dim} on {capability or 'a CPU'}; choose another number of groups or of shared "
                "dimensions, or --attention-backend torch_native"
            )
    else:
        raise BackendRefusal(
            f"attention backend {name!r} was never measured on a sliced latent of width {shape.latent_dim}; use "
            "--attention-backend torch_native, flashinfer or fa3"
        )
