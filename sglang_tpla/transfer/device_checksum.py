"""XXH3 (`frames.checksum`) of a payload that lies on a GPU, where reading it costs the host nothing.

A long input goes into eight lanes of 64 bits, stripe after stripe of 64 bytes (xxHash's specification,
doc/xxhash_spec.md): with the words d and those of the secret, s,

    lane_i += d_(i xor 1) + low32(d_i xor s_i) * high32(d_i xor s_i)

and after each block of 16 stripes every lane is scrambled: ``lane = (lane xor lane >> 47 xor s_(16 + i)) * P``. What a
block adds does not depend on the lanes, so all blocks are summed at once (`sum_blocks`), and only the scrambling goes
block after block, in one warp (`scramble_blocks`): a fifth of a millisecond for 9 MB, beside the copies. The host ends
it with the last 1,024 bytes at most.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

STRIPE_BYTES, BLOCK_BYTES = 64, 1024
FOUND_BYTES = STRIPE_BYTES + STRIPE_BYTES + BLOCK_BYTES  # lanes, the stripe before the rest, the rest
MASK = (1 << 64) - 1
START = (0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
         0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1)  # fmt: skip
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
LAST = 121  # where in the secret the last stripe's words begin


def _stripes(data: np.ndarray, secret: np.ndarray) -> np.ndarray:
    """What stripes add to the lanes: uint64 ``[.., 8]`` of each, with as many words of the secret."""
    key = data ^ secret
    swapped = data.reshape(*data.shape[:-1], 4, 2)[..., ::-1].reshape(data.shape)
    return swapped + (key & np.uint64(0xFFFFFFFF)) * (key >> np.uint64(32))


def _words(first: int, stripes: int = 1) -> np.ndarray:
    """Words of the secret from a byte on, for stripes that each begin 8 bytes later: uint64 ``[stripes, 8]``."""
    words = np.frombuffer(SECRET, "<u8", stripes + 7, first)
    return np.lib.stride_tricks.sliding_window_view(words, 8)


def _cut(payload: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its whole blocks, but for one that is the end, and the rest, from the stripe before on."""
    blocks = (payload.numel() - 1) // BLOCK_BYTES * BLOCK_BYTES
    return payload[:blocks], payload[max(0, blocks - STRIPE_BYTES) :]


def find_reference(payload: torch.Tensor, found: torch.Tensor) -> None:
    """The twin of `find`, on the CPU."""
    blocks, rest = _cut(payload)
    words = blocks.numpy().view("<u8").reshape(-1, 16, 8)
    lanes, key = np.array(START, dtype=np.uint64), _words(128)[0]
    for added in _stripes(words, _words(0, 16)).sum(axis=1):
        lanes = lanes + added
        lanes = (lanes ^ (lanes >> np.uint64(47)) ^ key) * np.uint64(0x9E3779B1)
    found[:STRIPE_BYTES] = torch.from_numpy(lanes.view(np.uint8))
    found[STRIPE_BYTES : STRIPE_BYTES + rest.numel()] = rest


def find(payload: torch.Tensor, found: torch.Tensor) -> None:
    """What `end` makes the checksum of, once the current stream has come there.

    Args:
        payload: uint8 ``[n]``, contiguous, at an address that 16 divides, of at least one byte.
        found: uint8 ``[FOUND_BYTES]`` that the device reaches (pinned): the eight lanes after the whole blocks, then
            the stripe before them, if there are any, and all bytes that follow.
    """
    from sglang_tpla.transfer import device_checksum_triton as kernels

    whole, rest = _cut(payload)
    blocks, constants = whole.numel() // BLOCK_BYTES, _constants(payload.device)
    sums = torch.empty(blocks, kernels.LANES, dtype=torch.int64, device=payload.device)
    secret, start = constants[:24], constants[24:]
    if blocks:
        grid, shape = (-(-blocks // kernels.BLOCKS),), (kernels.STRIPES, kernels.LANES, kernels.BLOCKS)
        kernels.sum_blocks[grid](whole.view(torch.int64), secret, sums, blocks, *shape)
    places = found[:STRIPE_BYTES].view(torch.int64), blocks, rest, found[STRIPE_BYTES:], rest.numel()
    shape = kernels.LANES, kernels.STEPS, kernels.REST
    kernels.scramble_blocks[(1,)](sums, secret, start, *places, *shape, num_warps=1)


_kept: dict[torch.device, torch.Tensor] = {}


def _constants(device: torch.device) -> torch.Tensor:
    """The secret's 24 words, and the lanes at the start: int64 ``[32]``, copied to a device once."""
    if device not in _kept:
        words = np.concatenate((np.frombuffer(SECRET, "<u8"), np.array(START, dtype=np.uint64)))
        _kept[device] = torch.from_numpy(words.view(np.int64)).to(device)
    return _kept[device]


@dataclass(frozen=True)
class Pending:
    """A checksum that a GPU is on its way to: of ``size_bytes``, in ``found`` when ``done``."""

    found: torch.Tensor
    size_bytes: int
    done: torch.cuda.Event

    def digest(self) -> bytes:
        """Wait for it: 8 bytes."""
        self.done.synchronize()
        return end(self.found.numpy(), self.size_bytes)


def end(found: np.ndarray, size_bytes: int) -> bytes:
    """The checksum of a payload of ``size_bytes``, of what `find` found: uint8."""
    blocks = (size_bytes - 1) // BLOCK_BYTES
    lanes, rest = found[:STRIPE_BYTES].view(np.uint64), found[STRIPE_BYTES:]
    rest = rest[: size_bytes - blocks * BLOCK_BYTES + STRIPE_BYTES * (blocks > 0)]
    if not blocks:
        return xxhash.xxh3_64_digest(rest.data)
    after = rest[STRIPE_BYTES:]
    stripes = (after.size - 1) // STRIPE_BYTES
    words = np.frombuffer(after.tobytes(), "<u8", 8 * stripes).reshape(stripes, 8)
    if stripes:
        lanes = lanes + _stripes(words, _words(0, stripes)).sum(axis=0)
    last = np.frombuffer(rest[-STRIPE_BYTES:].tobytes(), "<u8")
    mixed = (lanes + _stripes(last, _words(LAST)[0])) ^ np.frombuffer(SECRET, "<u8", 8, 11)
    result = size_bytes * START[1]
    for low, high in mixed.reshape(4, 2).tolist():
        product = low * high
        result += (product & MASK) ^ (product >> 64)
    result &= MASK
    result = (result ^ (result >> 37)) * 0x165667919E3779F9 & MASK
    return (result ^ (result >> 32)).to_bytes(8, "big")


class DeviceChecksums:
    """Takes checksums of payloads on a GPU, on streams of its own that go before others: its kernels are short.

    Raises:
        RuntimeError: the kernels, which are compiled here, find another checksum than xxHash's library.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, threading.local()
        example = torch.arange(5000, device=device).to(torch.uint8)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        found, expected = (
            self.start(example, ready).digest(),
            xxhash.xxh3_64_digest(example.cpu().numpy().data),
        )
        if found != expected:
            raise RuntimeError(
                f"the checksum kernels found {found.hex()} on {device} where XXH3 is {expected.hex()}"
            )

    def start(self, payload: torch.Tensor, ready: torch.cuda.Event) -> Pending:
        """Begin with a payload when ``ready`` has happened.

        Args:
            payload: contiguous, of at least one byte, at an address that 16 divides. It stays as it is, and is kept,
                until the digest is there.
        """
        data = payload.reshape(-1).view(torch.uint8)
        found = torch.empty(FOUND_BYTES, dtype=torch.uint8, pin_memory=True)
        done = torch.cuda.Event(blocking=True)
        stream = self._stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            find(data, found)
            done.record(stream)
        return Pending(found, data.numel(), done)

    def _stream(self) -> torch.cuda.Stream:
        """This thread's: payloads of several threads are checked at once, each by its own warp."""
        stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = torch.cuda.Stream(self._device, priority=-1)
        return stream
