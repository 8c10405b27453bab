"""Engine: a model on a device with its paged KV cache. Both workers hold one; schedulers decide what it runs.

load ─► forward(chunks) ─► logits of the sequences whose last token was computed ─► sample ─► tokens
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from ..protocol.config import ModelOptions
from ..protocol.errors import ConfigError
from ..protocol.schema import KVSchema
from .batch import prepare_batch
from .decoder import Decoder
from .kv_cache import PagedKVCache
from .kv_schema import kv_schema
from .model_config import ModelConfig
from .resolve import resolve_device, resolve_folder, resolve_max_model_len
from .rope import rope_table
from .sampler import TokenSample, sample
from .sequence import Sequence, StepChunk
from .weights import Progress, dummy_weights, load_weights

CUDA_MEMORY_SHARE = 0.9


class Engine:
    """Not thread-safe: one thread runs forward and sample. The cache may be read and written from others, page by page."""

    def __init__(self, config: ModelConfig, schema: KVSchema, decoder: Decoder, cache: PagedKVCache, max_model_len: int) -> None:
        self.config = config
        self.schema = schema
        self.cache = cache
        self.page_size = schema.block_size
        self.device = cache.data.device
        self.max_model_len = max_model_len
        self._decoder = decoder

    @classmethod
    def load(cls, options: ModelOptions, *, kv_capacity_tokens: int, num_threads: int, progress: Progress | None = None) -> Engine:
        """A ready engine.

        Args:
            options: path empty: the model that comes with Halfmoon.
            kv_capacity_tokens: rounded up to pages; 0: 90 % of the memory left on CUDA, twice max_model_len on CPU.
            num_threads: of torch on CPU, for the whole process.
            progress: called with (what is being done, bytes done, bytes in all).

        Raises CheckpointError, UnsupportedArchitecture, or ConfigError where the options don't fit model or machine.
        """
        folder = resolve_folder(options)
        config = ModelConfig.from_folder(folder)
        max_model_len = resolve_max_model_len(config, options)
        device = _device(resolve_device(options), num_threads)
        schema = kv_schema(config, options)
        dtype = getattr(torch, schema.dtype)
        if options.load_format == "dummy":
            weights = dummy_weights(config, dtype, device, progress)
        else:
            weights = load_weights(folder, config, dtype, device, progress)
        num_tokens = kv_capacity_tokens or _default_capacity(schema, max_model_len, device)
        cache = PagedKVCache(schema, -(-num_tokens // schema.block_size), device)
        return cls(config, schema, Decoder(config, weights, rope_table(config, max_model_len, device)), cache, max_model_len)

    @torch.inference_mode()
    def forward(
        self,
        chunks: Seq[StepChunk],
        *,
        before_layer: Callable[[int], None] | None = None,
        after_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Computes the chunks, one of a sequence at most, and leaves their K and V in the sequences' pages.

        Args:
            before_layer: called with l before layer l's attention reads the pages: a prefix may still be arriving.
            after_layer: called with l once layer l's K and V of the chunks stand in the pages.

        Returns:
            fp32 logits [number of chunks with is_last, vocab_size], in the chunks' order.

        Raises ValueError for a chunk without tokens or pages; what a hook raises passes through.
        """
        batch = prepare_batch(chunks, self.page_size, self.device)
        return self._decoder.forward(batch, self.cache, before_layer, after_layer)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[TokenSample]:
        """The next token of each sequence from its row of logits.

        The token at output index i of a request is a function of (logits, sampling parameters, tokens so far, i) alone, so
        that a replay on another worker draws the same one. The sequences are not changed.
        """
        return sample(logits, sequences, self.config.eos_token_ids)


def _device(kind: str, num_threads: int) -> torch.device:
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("model.device is 'cuda' and torch finds no usable GPU; set it to 'cpu' or install torch for CUDA")
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(max(1, num_threads))
    return torch.device("cpu")


def _default_capacity(schema: KVSchema, max_model_len: int, device: torch.device) -> int:
    """Tokens."""
    if device.type == "cpu":
        return 2 * max_model_len
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_free_bytes * CUDA_MEMORY_SHARE) // schema.block_bytes * schema.block_size
