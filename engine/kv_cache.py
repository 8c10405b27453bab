"""The paged KV cache: one allocation, and the way of a block out of it and back.

data          [layer][k|v][page][kv_head][token][head_dim]      what kernels read: one layer is kv_pages
block slice   [block][k|v][kv_head][token][head_dim]            one layer of a run of blocks, on the wire and in stores
A page is a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels.kv_pack import kv_pack, kv_unpack
from ..protocol.schema import KVSchema
from .pinned_memory import PinnedMemory
from .row_copy import to_buffer, to_device, to_host


class PagedKVCache:
    """Not locked: callers see to it that nobody reads a page while another writes it. Any thread may call.

    Invariant: every number in it is finite (it starts as zeros), so that masked keys weigh 0 and never NaN.
    """

    def __init__(self, schema: KVSchema, num_pages: int, device: torch.device, num_scratch_pages: int = 0) -> None:
        """num_scratch_pages: behind the num_pages that may be handed out; padding writes there, and nobody reads."""
        self.schema = schema
        self.num_pages = num_pages
        self.page_size = schema.block_size
        num_all = num_pages + num_scratch_pages
        both, *page_shape = schema.layer_shape
        self.data = torch.zeros((schema.num_layers, both, num_all, *page_shape), dtype=getattr(torch, schema.dtype), device=device)
        self._layers = list(self.data.unbind(0))
        # bytes, for numpy knows no bfloat16: [layer, k|v, page, bytes of K or V of a page]
        self._bytes = self.data.view(torch.uint8).view(schema.num_layers, both, num_all, -1)
        self.on_cpu = device.type == "cpu"
        self.pinned = PinnedMemory(device)  # what blocks may be copied from and into directly

    def layer(self, layer: int) -> torch.Tensor:
        """kv_pages of one layer, a view: [2, num_pages, num_kv_heads, page_size, head_dim]."""
        return self._layers[layer]

    def read_blocks(self, layer: int, pages: Sequence[int]) -> torch.Tensor:
        """A copy of one layer of pages: [n, 2, num_kv_heads, page_size, head_dim], contiguous, on the cache's device."""
        return kv_pack(self._layers[layer], self._index(pages))

    def write_blocks(self, layer: int, pages: Sequence[int], blocks: torch.Tensor) -> None:
        """blocks as read_blocks gives them, of the cache's dtype; a page may stand once in pages. Raises ValueError for other blocks."""
        kv_unpack(blocks.to(self.data.device), self._layers[layer], self._index(pages))

    def read_bytes(self, layer: int, pages: Sequence[int]) -> np.ndarray:
        """As read_blocks, as uint8 [n, layer_bytes] in the host's memory."""
        return block_bytes(self.read_blocks(layer, pages))

    def write_bytes(self, layer: int, pages: Sequence[int], blocks: Sequence[np.ndarray] | np.ndarray) -> None:
        """As write_blocks, from uint8 [layer_bytes] per page; read-only arrays are fine.

        Raises ValueError where a block is of another size.
        """
        for block in blocks:
            if block.nbytes != self.schema.layer_bytes:
                raise ValueError(f"a block slice has {block.nbytes} bytes; this cache takes {self.schema.layer_bytes}")
        if self.on_cpu:
            into = self.host_bytes(layer)
            for page, block in zip(pages, blocks, strict=True):
                into[:, page] = block.reshape(2, -1)
        else:
            self.write_blocks(layer, pages, blocks_from_bytes(np.stack(list(blocks)), self.schema))

    def host_bytes(self, layer: int) -> np.ndarray:
        """On CPU: uint8 [2, num_pages, bytes of K or V of a page], a view of one layer."""
        return self._bytes[layer].numpy()

    # on CUDA, and asynchronous: on the current stream

    def copy_out(self, layers: range, pages: Sequence[int], runs: Sequence[np.ndarray]) -> None:
        """Layers of pages into rows of pinned memory, uint8 [rows of a run, len(layers) * layer_bytes] each.

        Raises ValueError for what is not pinned.
        """
        targets = [self.pinned.tensor(run) for run in runs]
        if any(target is None for target in targets):
            raise ValueError("these rows are not in pinned memory; copy to a buffer instead")
        to_host(self.packed(layers, pages), [target for target in targets if target is not None])

    def copy_to_buffer(self, layer: int, pages: Sequence[int]) -> torch.Tensor:
        """One layer of pages as pinned uint8 [n, layer_bytes] of the host's."""
        return to_buffer(self.packed(range(layer, layer + 1), pages))

    def copy_in(self, layers: range, pages: Sequence[int], runs: Sequence[np.ndarray]) -> None:
        """Rows, uint8 [rows of a run, len(layers) * layer_bytes] each, into layers of pages. Pinned ones have to stay until the stream
        gets there. Raises ValueError for rows of another size."""
        width = len(layers) * self.schema.layer_bytes
        if any(run.shape[1] != width for run in runs):
            raise ValueError(f"a slice of {len(layers)} layers of a block has {runs[0].shape[1]} bytes; this cache takes {width}")
        self.unpack(layers, pages, to_device(runs, self.pinned, self.data.device))

    def unpack(self, layers: range, pages: Sequence[int], staged: torch.Tensor) -> None:
        """staged: uint8 [n, len(layers) * layer_bytes] on the device, into layers of pages."""
        schema = self.schema
        shape = (len(staged), len(layers), *schema.layer_shape)
        blocks, index = staged.view(self.data.dtype).view(shape), self._index(pages)
        for place, layer in enumerate(layers):
            kv_unpack(blocks[:, place], self._layers[layer], index)

    def packed(self, layers: range, pages: Sequence[int]) -> torch.Tensor:
        """uint8 [n, len(layers) * layer_bytes] on the device."""
        schema, index = self.schema, self._index(pages)
        shape = (len(pages), len(layers), *schema.layer_shape)
        packed = torch.empty(shape, dtype=self.data.dtype, device=self.data.device)
        for place, layer in enumerate(layers):
            kv_pack(self._layers[layer], index, packed[:, place])
        return packed.view(torch.uint8).view(len(pages), -1)

    def copy_page(self, source: int, target: int) -> None:
        """All layers of a page into another one."""
        self.data[:, :, target] = self.data[:, :, source]

    def zero_tail(self, page: int, num_tokens: int) -> None:
        """Clears tokens >= num_tokens of page in every layer, so that a partial block's bytes are those of its tokens alone."""
        self.data[:, :, page, :, num_tokens:] = 0

    def find_not_finite(self, pages: Sequence[int]) -> list[int]:
        """The pages with a number that is not finite. Waits for the current stream."""
        index = self._index(pages)
        sound = torch.ones(len(pages), dtype=torch.bool, device=self.data.device)
        for layer in self._layers:
            sound &= layer[:, index].float().isfinite().transpose(0, 1).flatten(1).all(dim=1)
        return [page for page, ok in zip(pages, sound.tolist(), strict=True) if not ok]

    def scrub(self, pages: Sequence[int]) -> None:
        """What is no finite number in these pages becomes 0, on the current stream."""
        index = self._index(pages)
        for layer in self._layers:
            held = layer[:, index]
            layer[:, index] = torch.where(held.float().isfinite(), held.float(), 0.0).to(held.dtype)

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(pages, dtype=torch.int64)
        # pinned: from pageable memory the copy would wait for what the stream still has to do
        return index if self.on_cpu else index.pin_memory().to(self.data.device, non_blocking=True)


def block_bytes(blocks: torch.Tensor) -> np.ndarray:
    """[n, 2, num_kv_heads, page_size, head_dim] as uint8 [n, layer_bytes]; shares memory with a contiguous CPU tensor."""
    return blocks.contiguous().cpu().view(torch.uint8).reshape(len(blocks), -1).numpy()


def blocks_from_bytes(data: np.ndarray, schema: KVSchema) -> torch.Tensor:
    """The inverse: writable uint8 [n, layer_bytes] as a CPU tensor that shares its memory."""
    return torch.from_numpy(data).view(getattr(torch, schema.dtype)).reshape(len(data), *schema.layer_shape)
