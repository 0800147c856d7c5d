"""The checks that a decode rank must pass before a prefill rank serves it: one sentence for each mismatch."""

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RETIRED_NAME, SENDER_DTYPES, RowFormat
from sglang_tpla.config import fp8_rows_retired
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.messages import PROTOCOL_VERSIONS, CacheLayout, Hello


def agreed_version(versions: tuple[int, int]) -> int | None:
    """Return the highest protocol version that both sides speak, or None."""
    version = min(versions[1], PROTOCOL_VERSIONS[1])
    return version if version >= max(versions[0], PROTOCOL_VERSIONS[0]) else None


def announced_rows(layout: CacheLayout) -> RowFormat:
    """Return the row format that a decode rank announced.

    Raises:
        ValueError: there is no such format.
    """
    return RowFormat.announced(layout.dtype, layout.latent_dim, layout.widths, layout.shared, layout.rope_dim)


def mismatch(hello: Hello, pool: CachePool, metadata: MetadataRows, model_hash: str) -> str | None:
    """Return why a prefill rank with this cache cannot serve a decode rank, or None."""
    layout = hello.layout
    # the sender makes encoded rows, and can make them from any of these dtypes
    encoded = RowFormat.is_encoded(layout.dtype) and pool.dtype in SENDER_DTYPES
    if agreed_version(hello.versions) is None:
        return (
            f"protocol version: prefill speaks {PROTOCOL_VERSIONS[0]} to {PROTOCOL_VERSIONS[1]}, decode "
            f"{hello.versions[0]} to {hello.versions[1]}; run the same release on both sides"
        )
    if layout.dtype.partition(" ")[0] == RETIRED_NAME:
        return fp8_rows_retired(f"row format: decode announces {layout.dtype}, which", "--tpla-rows sketched on decode")
    if metadata.item_bytes != layout.metadata_bytes and len(pool.layers) != len(layout.widths):
        return (
            f"speculative decoding: prefill holds {len(pool.layers)} layers, decode {len(layout.widths)}, and their "
            "metadata rows differ: one of them has a draft model's layer; give --speculative-algorithm to both or to "
            "neither"
        )
    pairs = (
        ("model", model_hash, hello.model_hash, "serve the same checkpoint on both sides"),
        ("latent width (kv_lora_rank)", pool.latent_dim, layout.latent_dim, "serve the same model on both sides"),
        ("rope width", pool.rope_dim, layout.rope_dim, "serve the same model on both sides"),
        (
            "cache dtype",
            layout.dtype if encoded else pool.row_format.name(pool.dtype),
            layout.dtype,
            "set the same --kv-cache-dtype and --dtype on both sides, or --tpla-rows sketched on decode alone",
        ),
        ("page size", pool.page_size, layout.page_size, "set the same --page-size on both sides"),
        (
            "metadata row sizes",
            metadata.item_bytes,
            layout.metadata_bytes,
            "run the same engine release with the same metadata settings on both sides",
        ),
    )
    for what, ours, theirs, remedy in pairs:
        if ours != theirs:
            return f"{what}: prefill has {ours}, decode has {theirs}; {remedy}"
    ours_range = range(len(pool.layers))
    theirs_range = range(layout.first_layer, layout.first_layer + len(layout.widths))
    if ours_range.start < theirs_range.start or ours_range.stop > theirs_range.stop:
        return (
            f"layers: prefill holds {ours_range.start}...{ours_range.stop - 1}, decode "
            f"{theirs_range.start}...{theirs_range.stop - 1}; the decode rank must hold every layer it is sent"
        )
    d = pool.latent_dim
    if len(layout.shared) != len(layout.widths) or any(
        not 1 <= width <= d or shared > width for width, shared in zip(layout.widths, layout.shared, strict=False)
    ):
        return (
            f"projection: expected one width in 1...{d} and one shared width below it a layer, got widths "
            f"{layout.widths[:4]}... and shared {layout.shared[:4]}...; make the artifact anew"
        )
    if not hello.projection and any(width != d for width in layout.widths):
        return (
            f"projection: widths {layout.widths[:4]}... below {d} need a projection and none was announced; start "
            "decode with --tpla-artifact"
        )
    try:
        rows = announced_rows(layout)
    except ValueError as error:
        return f"row format: {error}; use the model's own cache dtype or an artifact of other widths"
    if rows.encoded and not hello.projection and any(layer.columns != d for layer in rows.layers):
        return (
            f"projection: {layout.dtype} of widths {layout.widths[:4]}... need a projection and none was announced; "
            "start decode with --tpla-artifact"
        )
    # the common part may be longer than a row, because it holds two roundings of the shared columns
    row_bytes = max(max(rows.part_items(part)) for part in Part) * rows.item_dtype(pool.dtype).itemsize
    if row_bytes > hello.max_chunk_bytes:
        return (
            f"chunk size: one row or part of it has {row_bytes} bytes, the decode rank takes {hello.max_chunk_bytes}; "
            "raise chunk_bytes there"
        )
    return None
