"""A bfloat16 checkpoint made into a block-FP8 one, in the format that DeepSeek ships, to serve and to compare with.

Every weight that DeepSeek-V3's own FP8 checkpoint quantises is quantised here: projections of attention, dense layers,
experts and shared experts; embeddings, head, norms and router stay. SGLang cuts such weights between blocks only, so
the inner width of small experts is padded: the units in equal shares over as many blocks, so that every rank has some,
and zeros between them, which add nothing.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from sglang_tpla.reference_model.feed_forward import Dense
from sglang_tpla.reference_model.forward import PlainModel

BLOCK = 128
LARGEST = 448.0  # of e4m3
QUANTISED = re.compile(r"\.layers\.\d+\..*_proj(_with_mqa)?\.weight$")
EXPERT = re.compile(r"\.mlp\.(experts\.\d+|shared_experts)\.(gate|up|down)_proj\.weight$")
BLOCK_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [out, in] and scales [ceil(out/128), ceil(in/128)] float32 of a weight [out, in]."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padding = (0, columns * BLOCK - weight.shape[1], 0, rows * BLOCK - weight.shape[0])
    blocks = F.pad(weight.float(), padding).view(rows, BLOCK, columns, BLOCK)
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    codes = (blocks / scales[:, None, :, None]).view(rows * BLOCK, columns * BLOCK)
    return codes[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scales


def spread(weight: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """The weight with ``dim`` widened to ``width``: as many units at the start of each block, then zeros.

    Raises:
        ValueError: the units do not come out evenly.
    """
    units, blocks = weight.shape[dim], width // BLOCK
    if width % BLOCK or units % blocks or units > width:
        raise ValueError(f"{units} units cannot be spread over {width} in blocks of {BLOCK}")
    parts = weight.unflatten(dim, (blocks, units // blocks)).movedim(dim + 1, -1)
    return F.pad(parts, (0, BLOCK - units // blocks)).movedim(-1, dim + 1).flatten(dim, dim + 1).contiguous()


def convert(source: Path, target: Path, expert_width: int) -> None:
    """Write the block-FP8 checkpoint of the folder ``source`` into the folder ``target``.

    Args:
        expert_width: inner width of an expert in ``target``; a multiple of 128 for each rank that will serve it.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    shared = expert_width * (config.get("n_shared_experts") or 0)
    config |= {"moe_intermediate_size": expert_width, "quantization_config": BLOCK_FP8}
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    for name in [name for name in tensors if QUANTISED.search(name)]:
        if expert := EXPERT.search(name):
            width = shared if expert[1] == "shared_experts" else expert_width
            tensors[name] = spread(tensors[name], int(expert[2] == "down"), width)
        tensors[name], tensors[f"{name}_scale_inv"] = quantise_blocks(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """A linear layer's inputs [..., in] as e4m3 with one scale a token and 128 values gives them back."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / LARGEST
    codes = (groups / scales).to(torch.float8_e4m3fn)
    return (codes.float() * scales).flatten(-2).to(x.dtype)


class RoundedInputs(TorchFunctionMode):
    """Linear layers of the given weights see their inputs as a server's block-FP8 layers do.

    Args:
        weights: [out, in] each, in a multiple of 128.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._weights = {weight.data_ptr() for weight in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1].data_ptr() in self._weights:
            args = (round_inputs(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def quantised_weights(model: PlainModel) -> list[torch.Tensor]:
    """The weights of the layers that a server computes in block-FP8.

    The absorbed halves of kv_b_proj are not among them, because a server has them in bfloat16.
    """
    found: list[torch.Tensor | None] = []
    for layer in model.layers:
        attention, mlp = layer.attention, layer.feed_forward
        found += [attention.q_a, attention.q_b, attention.kv_a, attention.o]
        dense = [mlp] if isinstance(mlp, Dense) else [*mlp.experts, *([mlp.shared] if mlp.shared else [])]
        found += [weight for one in dense for weight in (one.gate, one.up, one.down)]
    return [weight for weight in found if weight is not None]
