"""The twins of `row_kernels` in PyTorch, for pools on the CPU: what a chunk is made of, and where it goes."""

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows
from sglang_tpla.cache_rows.parts import Field, Part
from sglang_tpla.transfer.memory.layer_table import LayerTable


def weights(z: torch.Tensor) -> torch.Tensor:
    """Return a projection, float32 ``[layers, d, columns]``, as `project` takes it."""
    return z


def project(
    pool: LayerTable,
    layers: range,
    slots: torch.Tensor,
    z: torch.Tensor | None,
    columns: tuple[slice, ...],
    latent_dim: int,
    key: int,
    out: torch.Tensor,
    wrong: torch.Tensor | None,
) -> None:
    """Gather rows and project their latents.

    Args:
        pool: ``[slots, d + rope]`` of each layer.
        layers: those of the chunk, by index.
        slots: int64 ``[tokens]``.
        z: `weights` of these layers, or None for the latent itself.
        columns: those of ``z`` that are wanted, in at most two runs; unread without one.
        latent_dim: d.
        key: how many values of the rotary key follow; 0 for none.
        out: ``[layers, tokens, columns + key]``, contiguous, written; float32, or rounded once.
        wrong: int32 ``[1]``, set to 0 for `encode`; or None.
    """
    rows = torch.stack([pool[layer].index_select(0, slots) for layer in layers])
    latent = rows[..., :latent_dim]
    if z is not None:
        runs = [z[:, :, run] for run in columns]
        latent = torch.bmm(latent.to(torch.float32), runs[0] if len(runs) == 1 else torch.cat(runs, dim=2))
    width = out.shape[-1] - key
    out[..., :width] = latent
    out[..., width:] = rows[..., latent_dim : latent_dim + key]
    if wrong is not None:
        wrong.zero_()


def encode(rows: LayerRows, part: Part, work: torch.Tensor, key: int, out: torch.Tensor, wrong: torch.Tensor) -> None:
    """Write one part of encoded rows.

    Args:
        work: ``[layers, tokens, columns + key]``, contiguous, as `project` leaves it: float32 for sketched rows.
        key: how many of them are the rotary key's.
        out: uint8 ``[layers, tokens, items of the part]``, contiguous, written.
        wrong: int32 ``[1]``, set to 1 where sketched rows have a value that is not finite.
    """
    columns = work.shape[-1] - key
    rows.encode(work[..., :columns], work[..., columns:], part, out)
    if isinstance(rows, GroupRows):
        # a value that is not finite makes its sum so as well
        wrong |= ~torch.isfinite(work.sum(dtype=torch.float64))


def scatter(
    pool: LayerTable, layers: range, slots: torch.Tensor, fields: tuple[Field, ...], payload: torch.Tensor
) -> None:
    """Put a payload into pool rows.

    Args:
        pool: ``[slots, items]`` of each layer.
        layers: those of the chunk, by index.
        slots: int64 ``[tokens]``, no two alike.
        fields: which items of a row, and where they are in the payload; at least one.
        payload: ``[layers, tokens, items of the part]`` of the pool's dtype, contiguous.
    """
    for layer, values in zip(layers, payload.unbind(), strict=True):
        for field in fields:
            pool[layer][slots, field.start : field.stop] = values[:, field.payload : field.payload + field.size]
