"""Read a Hugging Face checkpoint directory tensor by tensor: one file or a sharded index, plain or block-FP8.

A tensor is loaded only on request, so reading a 671-billion-parameter checkpoint takes the memory of one tensor at a
time. DeepSeek ships block-FP8: ``X.weight`` in float8_e4m3fn [out, in] with ``X.weight_scale_inv`` [ceil(out/128),
ceil(in/128)] in float32; the value is the stored number times its block's scale. A missing or unreadable file, a
missing tensor or scale, weights quantised in another way, and a model without multi-head latent attention raise
`CheckpointError`.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sglang_tpla.reference_model.config_file import CheckpointError as CheckpointError
from sglang_tpla.reference_model.config_file import Config, read_config, weight_block

_ATTENTION_PROBE = "layers.0.self_attn.kv_b_proj.weight"


class Checkpoint:
    """A checkpoint directory.

    Args:
        path: directory with ``config.json`` and ``*.safetensors`` (``model.safetensors.index.json`` when sharded).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: Config = read_config(self.path / "config.json")
        self._files = self._index()
        self.prefix = self._find_prefix()

    def _index(self) -> dict[str, str]:
        index_path = self.path / "model.safetensors.index.json"
        if index_path.is_file():
            try:
                weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
                raise CheckpointError(f"{index_path} has no readable weight_map: {error!r}") from error
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(
                    f"expected weight_map in {index_path} to name each tensor's file, found no such map"
                )
            return weight_map
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"expected *.safetensors in {self.path}, found none; convert the checkpoint to safetensors first"
            )
        names: dict[str, str] = {}
        for file in files:
            with _opened(file) as handle:
                found = dict.fromkeys(handle.keys(), file.name)
            if twice := names.keys() & found.keys():
                name = min(twice)
                raise CheckpointError(
                    f"expected each tensor in one file, found {name!r} in {names[name]} and {file.name} of {self.path} "
                    f"without {index_path.name}, which would choose: leave one of the files out, or add the index"
                )
            names |= found
        return names

    def _find_prefix(self) -> str:
        found = sorted(name[: -len(_ATTENTION_PROBE)] for name in self._files if name.endswith(_ATTENTION_PROBE))
        # A draft or an encoder may have such a layer too, but without an embedding of the same prefix.
        found = [prefix for prefix in found if f"{prefix}embed_tokens.weight" in self._files] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.path} has tensors of several models, {', '.join(f'{prefix}*' for prefix in found)}: expected "
                "one with multi-head latent attention; leave the files of the others out of the folder"
            )
        raise CheckpointError(
            f"{self.path} has no tensor named *{_ATTENTION_PROBE}: not a model with multi-head latent attention, or "
            "not all of its files (expected a DeepSeek V2/V3 or Kimi K2 shaped checkpoint)"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def layer_name(self, layer: int, tail: str) -> str:
        """Return the stored name of a layer's tensor, as in ``layer_name(3, "self_attn.kv_b_proj.weight")``."""
        return f"{self.prefix}layers.{layer}.{tail}"

    def _file_of(self, name: str) -> Path:
        if name not in self._files:
            raise CheckpointError(f"expected a tensor {name!r} in {self.path}, found none")
        file = self.path / self._files[name]
        if not file.is_file():
            raise CheckpointError(
                f"the index of {self.path} names {file.name} for {name!r}, which is missing; copy it too"
            )
        return file

    def check_files(self, layers: int) -> None:
        """Open every file with tensors of the first ``layers`` layers, before hours of work on the intact ones.

        Raises:
            CheckpointError: a layer or a file is missing, a file cannot be read, or it lacks what the index promises.
        """
        start, promised = f"{self.prefix}layers.", dict[str, set[str]]()
        for layer in range(layers):
            self._file_of(self.layer_name(layer, _ATTENTION_PROBE.removeprefix("layers.0.")))
        for name, file in self._files.items():
            layer_number = name.removeprefix(start).split(".")[0]
            if name.startswith(start) and layer_number.isdecimal() and int(layer_number) < layers:
                promised.setdefault(file, set()).add(name)
        for file, names in promised.items():
            with _opened(self._file_of(min(names))) as handle:
                absent = names.difference(handle.keys())
            if absent:
                raise CheckpointError(
                    f"the index of {self.path} names {file} for {min(absent)!r}, which is not in that file "
                    f"({len(absent)} such tensors): copy the checkpoint again"
                )

    def stored(self, name: str) -> torch.Tensor:
        """Return the tensor as stored, in its stored dtype."""
        with _opened(self._file_of(name)) as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def stored_head(self, name: str, limit_bytes: int) -> bytes:
        """Return the first ``limit_bytes`` of a tensor's stored bytes, row-major, and read no more rows than needed."""
        with _opened(self._file_of(name)) as handle:
            rows = handle.get_slice(name)
            shape = rows.get_shape()
            row_values = math.prod(shape[1:])
            # A stored value takes at least one byte, so this many rows suffice.
            tensor = rows[: -(-limit_bytes // max(row_values, 1))]
        raw: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        return raw[:limit_bytes]

    def tensor(
        self, name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return the tensor's values in ``dtype``; block-FP8 is dequantised.

        Args:
            shape: the shape that the config implies, if it implies one.
        """
        stored = self.stored(name)
        if not stored.is_floating_point():
            # Integers count steps of a scale, or hold several values each: used as values, they give another model.
            raise CheckpointError(
                f"{name!r} in {self.path} is stored as {stored.dtype}: expected bfloat16, float16, float32 or "
                "DeepSeek's block-FP8; take a checkpoint whose weights are not quantised to integers"
            )
        if shape is not None and tuple(stored.shape) != shape:
            raise CheckpointError(
                f"expected {name!r} in {self.path} to be {shape}, as its config.json implies, got "
                f"{tuple(stored.shape)}: the two are not of one model"
            )
        if stored.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return stored.to(dtype)
        scale_name = f"{name}_scale_inv"
        if scale_name not in self._files:
            raise CheckpointError(f"{name!r} is stored as {stored.dtype} and needs {scale_name!r}, which is missing")
        return dequantise_blocks(stored, self.stored(scale_name), weight_block(self.config)).to(dtype)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file of tensors; an error names the file that cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}; copy it again") from error


def dequantise_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply an FP8 weight [out, in] by its scales [ceil(out/block0), ceil(in/block1)], in float32."""
    expected = (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"expected block scales of shape {expected} for a weight {tuple(weight.shape)} in blocks {block}, got "
            f"{tuple(scale.shape)}"
        )
    rows = scale.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    return weight.float() * rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]


def local_checkpoint(model_path: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint: the path itself, or a snapshot of the Hugging Face hub."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path, revision=revision))
