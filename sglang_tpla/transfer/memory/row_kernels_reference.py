"""The twins of `row_kernels` in PyTorch, for pools on the CPU. They document the kernels' arguments."""

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows
from sglang_tpla.cache_rows.parts import Field, Part
from sglang_tpla.transfer.memory.layer_table import LayerTable


def weights(z: torch.Tensor) -> torch.Tensor:
    """Return a projection, float32 ``[layers, d, columns]``, in the form that `project` takes."""
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
        layers: the chunk's layers, by index.
        slots: int64 ``[tokens]``.
        z: `weights` of these layers, or None for the latent itself.
        columns: the wanted columns of ``z``, in at most two runs; unused without ``z``.
        latent_dim: d.
        key: how many values of the rotary key follow the columns; 0 for none.
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
        key: how many of ``work``'s values per token belong to the rotary key.
        out: uint8 ``[layers, tokens, items of the part]``, contiguous, written.
        wrong: int32 ``[1]``, set to 1 if sketched rows have a value that is not finite.
    """
    columns = work.shape[-1] - key
    rows.encode(work[..., :columns], work[..., columns:], part, out)
    if isinstance(rows, GroupRows):
        # the sum is not finite if any value is not
        wrong |= ~torch.isfinite(work.sum(dtype=torch.float64))


def scatter(
    pool: LayerTable, layers: range, slots: torch.Tensor, fields: tuple[Field, ...], payload: torch.Tensor
) -> None:
    """Write a payload into pool rows.

    Args:
        pool: ``[slots, items]`` of each layer.
        layers: the chunk's layers, by index.
        slots: int64 ``[tokens]``, no two alike.
        fields: the items of a row to write, and their places in the payload; at least one field.
        payload: ``[layers, tokens, items of the part]`` of the pool's dtype, contiguous.
    """
    for layer, values in zip(layers, payload.unbind(), strict=True):
        for field in fields:
            pool[layer][slots, field.start : field.stop] = values[:, field.payload : field.payload + field.size]
