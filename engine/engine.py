"""Engine: a model on a device with its paged KV cache. Both workers hold one; schedulers decide what it runs.

load ─► forward(chunks) ─► logits of the sequences whose last token was computed ─► sample ─► tokens
        launch(chunks)  ─► InFlight, nothing waited for ─► launch(chunks behind them) ─► tokens of the first ─► …

On CUDA the load ends with every kernel compiled and the decode steps captured as graphs, which draw their tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from ..protocol.config import ModelOptions
from ..protocol.errors import ConfigError
from ..protocol.memory import available_bytes
from ..protocol.schema import KVSchema
from .batch import prepare_batch
from .decode_graph import can_capture
from .decoder import Decoder
from .executor import PromptLogprobs
from .kv_cache import PagedKVCache
from .kv_schema import kv_schema
from .model_config import ModelConfig
from .product_ways import choose_ways
from .prompt_logprobs import prompt_logprobs
from .rank_group import Meeting, RankGroup
from .resolve import resolve_device, resolve_dtype, resolve_folder, resolve_max_model_len, resolve_quantization
from .rope import rope_table
from .sampler import TokenSample, sample
from .sequence import Sequence, StepChunk
from .shard import WHOLE, Shard
from .staging import Staging
from .step_graphs import InFlight, StepGraphs
from .token_masks import TokenMasks
from .warm_up import warm_up
from .weights import Progress, dummy_weights, load_weights

CUDA_MEMORY_SHARE = 0.9
CPU_MEMORY_SHARE = 0.25  # of a worker: others are on the machine, and the node's arena
MAX_HEAD_DIM = 256  # of paged_decode, without which there are no graphs


class Engine:
    """Not thread-safe: one thread runs forward, sample and launch. The cache may be read and written from others, page by page."""

    def __init__(self, config: ModelConfig, schema: KVSchema, decoder: Decoder, cache: PagedKVCache, max_model_len: int) -> None:
        self.config = config
        self.schema = schema
        self.cache = cache
        self.page_size = schema.block_size
        self.device = cache.data.device
        self.max_model_len = max_model_len
        self.weight_bytes = decoder.weights.num_bytes
        self.compute_dtype = str(decoder.weights.embed.dtype).removeprefix("torch.")
        self._decoder = decoder
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        self._graphs: StepGraphs | None = None

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        *,
        kv_capacity_tokens: int,
        num_threads: int,
        max_decode_batch: int = 0,
        cpu_prompts: int = 2,
        progress: Progress | None = None,
        meeting: Meeting | None = None,
    ) -> Engine:
        """A ready engine.

        Args:
            options: path empty: the model that comes with Halfmoon.
            kv_capacity_tokens: rounded up to pages; 0: 90 % of the memory left on CUDA; on CPU cpu_prompts times max_model_len, and at
                most a quarter of the free memory.
            num_threads: of torch on CPU, for the whole process.
            max_decode_batch: sequences in a step that decode; 0: none do. No use on CPU.
            progress: called with (what is being done, how much of it is done, how much there is): bytes, kernels, graphs.
            meeting: with the other ranks of a tensor-parallel group, whose parts of the model they hold. Every rank makes the same
                calls of forward and launch.

        Raises CheckpointError, UnsupportedArchitecture, or ConfigError where the options don't fit model or machine.
        """
        folder = resolve_folder(options)
        config = ModelConfig.from_folder(folder)
        shard = WHOLE if meeting is None else meeting.shard
        shard.require_fits(config)
        max_model_len = resolve_max_model_len(config, options)
        device = _device(resolve_device(options), num_threads)
        schema = kv_schema(config, options)
        dtype, quantization = getattr(torch, resolve_dtype(config, options)), resolve_quantization(config, options)
        group = None if meeting is None else RankGroup(meeting, device)
        if options.load_format == "dummy":
            weights = dummy_weights(config, dtype, device, progress, quantization, shard)
        else:
            weights = load_weights(folder, config, dtype, device, progress, quantization, shard)
        if can_capture(device):
            choose_ways((linear for layer in weights.layers for linear in layer.linears().values()), dtype, progress)
            torch.cuda.empty_cache()  # of the largest inputs and outputs that were tried
        num_tokens = kv_capacity_tokens or _default_capacity(schema, shard, cpu_prompts * max_model_len, device)
        decoder = Decoder(shard.part_of(config), weights, rope_table(config, max_model_len, device), group)
        num_pages = -(-num_tokens // schema.block_size)
        if group is not None:
            num_pages = group.least(num_pages, device)  # pages have the same numbers on every rank
        cache = PagedKVCache(shard.pages_of(schema), num_pages, device, num_scratch_pages=1 if device.type == "cuda" else 0)
        engine = cls(config, schema, decoder, cache, max_model_len)
        if can_capture(device):
            engine._get_ready(max_decode_batch, progress)
        return engine

    def described(self) -> str:
        """What of this rank's memory is taken, for the log."""
        group = self._decoder.group
        rank = "" if group is None else f"rank {group.shard.rank} of {group.shard.size}: "
        num_tokens = self.cache.num_pages * self.page_size
        weights, pages = (num_bytes / 2**30 for num_bytes in (self.weight_bytes, self.cache.data.nbytes))
        return f"{rank}weights {weights:.2f} GiB, pages for {num_tokens} tokens {pages:.2f} GiB, on {self.device}"

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of the graphs that steps with chunks run in, ascending; empty without graphs."""
        return () if self._graphs is None else self._graphs.mixed.row_counts

    def _get_ready(self, max_decode_batch: int, progress: Progress | None) -> None:
        assert self._staging is not None
        scratch_page = self.cache.num_pages
        warm_up(self._decoder, self.cache, scratch_page, self.max_model_len, self._staging, progress)
        if self.config.head_dim <= MAX_HEAD_DIM:
            self._graphs = StepGraphs(self._decoder, self.cache, scratch_page, self.max_model_len, max_decode_batch, progress)

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
            fp32 logits [number of chunks with is_last, vocab_size], in the chunks' order. Those of a step that ran as a graph are
            overwritten by the next step.

        Raises ValueError for a chunk without tokens or pages; what a hook raises passes through.
        """
        if self._graphs is not None and before_layer is None:
            logits = self._graphs.run(chunks, after_layer)
            if logits is not None:
                return logits
        batch = prepare_batch(chunks, self.page_size, self.device, self._staging)
        return self._decoder.forward(batch, self.cache, before_layer, after_layer)

    @torch.inference_mode()
    def forward_scored(
        self, chunks: Seq[StepChunk], *, after_layer: Callable[[int], None] | None = None
    ) -> tuple[torch.Tensor, dict[Sequence, PromptLogprobs]]:
        """As forward, for a step with chunks that score their prompts. No graph holds it: the head sees many rows of them."""
        batch = prepare_batch(chunks, self.page_size, self.device, self._staging)
        decoder = self._decoder
        hidden, residual = decoder.layers(batch, self.cache, after_layer=after_layer)
        scored = prompt_logprobs(decoder.head, hidden, residual, chunks, self.config.vocab_size)
        return decoder.head(hidden[batch.last_rows], residual[batch.last_rows]), scored

    def compute(
        self, chunks: Seq[StepChunk], *, after_layer: Callable[[int], None] | None = None
    ) -> tuple[torch.Tensor, dict[Sequence, PromptLogprobs]]:
        """forward, or forward_scored where a chunk scores its prompt."""
        if any(chunk.scored for chunk in chunks):
            return self.forward_scored(chunks, after_layer=after_layer)
        return self.forward(chunks, after_layer=after_layer), {}

    @torch.inference_mode()
    def launch(self, chunks: Seq[StepChunk], *, after_layer: Callable[[int], None] | None = None) -> InFlight | None:
        """Starts a step, forward and sample in one, and waits for nothing; steps run in the order of these calls.

        None, and nothing begun, where the step's buffers don't hold it, or what it samples is more than a draw from the logits:
        penalties, bias, grammars, logprobs and min_tokens that are not there yet are sample's, the prompts' logprobs forward_scored's.

        Args:
            chunks: one of a single token may begin where its sequence's token_ids end: it then computes the token that the step
                launched last gives the sequence, whether that has been read or not. Its pages hold that token, too.
            after_layer: as forward's.
        """
        if self._graphs is None or any(chunk.sequence.scores_prompt for chunk in chunks):
            return None
        return self._graphs.launch(chunks, after_layer)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence], masks: TokenMasks | None = None) -> list[TokenSample]:
        """The next token of each sequence from its row of logits.

        The token at output index i of a request is a function of (logits, sampling parameters, tokens so far, i) alone, so
        that a replay on another worker draws the same one. The sequences are not changed.

        masks: of the sequences with a grammar, where they are made already.
        """
        if self._graphs is not None:
            token_ids = self._graphs.tokens(logits, sequences)
            if token_ids is not None:
                return [TokenSample(token_id, None, []) for token_id in token_ids]
        return sample(logits, sequences, self.config.eos_token_ids, masks)


def _device(kind: str, num_threads: int) -> torch.device:
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("model.device is 'cuda' and torch finds no usable GPU; set it to 'cpu' or install torch for CUDA")
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(max(1, num_threads))
    return torch.device("cpu")


def _default_capacity(schema: KVSchema, shard: Shard, cpu_tokens: int, device: torch.device) -> int:
    """Tokens. cpu_tokens: on CPU, where memory is there; its ranks share it."""
    if device.type == "cpu":
        return min(cpu_tokens, max(1, int(available_bytes() * CPU_MEMORY_SHARE) // schema.block_bytes) * schema.block_size)
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_free_bytes * CUDA_MEMORY_SHARE) // shard.pages_of(schema).block_bytes * schema.block_size
