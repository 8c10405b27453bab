"""The decoder: every supported architecture is this one, with what differs read from ModelConfig.

token_ids ─► embed ─► layers ─► norm ─► lm_head (rows asked for) ─► fp32 logits
layer:  x ─► norm ─► qkv ─► [qk-norm] RoPE, K and V into pages ─► attention over pages ─► o ─► + ─► norm ─► MLP ─► +
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F

from ..kernels.flash_prefill import flash_prefill
from ..kernels.kv_write import kv_write
from ..kernels.paged_decode import paged_decode
from ..kernels.rms_norm import rms_norm
from .batch import StepBatch
from .kv_cache import PagedKVCache
from .model_config import ModelConfig
from .rank_group import RankGroup
from .weights import DecoderWeights, LayerWeights

LayerHook = Callable[[int], None]


class Decoder:
    def __init__(self, config: ModelConfig, weights: DecoderWeights, cos_sin: torch.Tensor, group: RankGroup | None = None) -> None:
        """config, weights: of this rank's part. group: of the ranks that hold the others; None: there are none."""
        self.config = config
        self.weights = weights
        self.cos_sin = cos_sin  # fp32 [max_model_len, head_dim]
        self._scale = config.head_dim**-0.5
        self.group = group

    def forward(
        self, batch: StepBatch, cache: PagedKVCache, before_layer: LayerHook | None = None, after_layer: LayerHook | None = None
    ) -> torch.Tensor:
        """fp32 logits [len(batch.last_rows), vocab_size]; the batch's K and V stand in the cache."""
        hidden, residual = self.layers(batch, cache, before_layer, after_layer)
        if len(batch.last_rows) < len(hidden):
            hidden, residual = hidden[batch.last_rows], residual[batch.last_rows]
        return self.head(hidden, residual)

    def layers(
        self, batch: StepBatch, cache: PagedKVCache, before_layer: LayerHook | None = None, after_layer: LayerHook | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer adds to the residual, and the residual before it, both [num_tokens, hidden_size]."""
        eps = self.config.rms_norm_eps
        residual = self._embed(batch.token_ids)
        hidden = cast(torch.Tensor, rms_norm(residual, self.weights.layers[0].input_norm, eps))
        for index, layer in enumerate(self.weights.layers):
            attended = self._attention(index, layer, hidden, batch, cache.layer(index), before_layer)
            if after_layer is not None:
                after_layer(index)
            hidden, residual = rms_norm(self._summed(layer.o(attended)), layer.post_norm, eps, residual)
            hidden = self._summed(layer.mlp(hidden))
            if index + 1 < len(self.weights.layers):
                hidden, residual = rms_norm(hidden, self.weights.layers[index + 1].input_norm, eps, residual)
        return hidden, residual

    def head(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """fp32 logits [rows, vocab_size] of rows that layers() gave; the same ones on every rank."""
        last, _ = rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps, residual)
        lm_head = self.weights.lm_head
        if last.is_cuda and last.dtype != torch.float32:
            # the product's own fp32 sums: neither rounded to the weights' dtype nor written twice
            logits = torch.mm(last, lm_head.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(last, lm_head).float()
        return logits if self.group is None else self.group.gather_columns(logits)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size]. Each rank has some rows of the table, and adds nothing for other tokens."""
        table = self.weights.embed
        if self.group is None:
            # a row that gave no token may be in a step that was launched before the host knew; to look up -1 would end the device's context
            return F.embedding(token_ids.clamp(0, len(table) - 1), table)
        own = token_ids - self.group.shard.rank * len(table)
        found = F.embedding(own.clamp(0, len(table) - 1), table)
        return self.group.all_reduce(found.masked_fill_(((own < 0) | (own >= len(table))).unsqueeze(1), 0.0))

    def _summed(self, term: torch.Tensor) -> torch.Tensor:
        return term if self.group is None else self.group.all_reduce(term)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        batch: StepBatch,
        kv_pages: torch.Tensor,
        before_layer: LayerHook | None,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim], before the output projection."""
        config = self.config
        qkv = layer.qkv(hidden).view(len(hidden), -1, config.head_dim)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        q = kv_write(
            q,
            k,
            v,
            batch.positions,
            self.cos_sin,
            batch.slot_mapping,
            kv_pages,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=config.rms_norm_eps,
        )
        # as late as can be: a prefix on its way has had the projections' time to arrive
        if before_layer is not None:
            before_layer(index)
        if batch.is_decode:
            out = paged_decode(
                q,
                kv_pages,
                batch.block_table,
                batch.kv_lens,
                max_kv_len=batch.max_kv_len,
                scale=self._scale,
                sliding_window=config.layer_windows[index],
            )
        else:
            out = flash_prefill(
                q,
                kv_pages,
                batch.block_table,
                batch.cu_seqlens_q,
                batch.kv_lens,
                max_seqlen_q=batch.max_seqlen_q,
                max_kv_len=batch.max_kv_len,
                scale=self._scale,
                sliding_window=config.layer_windows[index],
                usual_num_seqs=batch.usual_num_seqs,
            )
            self._attend_decodes(index, q, kv_pages, batch, out)
        return out.view(len(hidden), -1)

    def _attend_decodes(self, index: int, q: torch.Tensor, kv_pages: torch.Tensor, batch: StepBatch, out: torch.Tensor) -> None:
        """The decode tokens before the chunks, into their rows of out."""
        if batch.decode_table is None or batch.decode_lens is None or len(batch.decode_lens) == 0:
            return
        num_decodes = len(batch.decode_lens)
        paged_decode(
            q[:num_decodes],
            kv_pages,
            batch.decode_table,
            batch.decode_lens,
            max_kv_len=batch.max_kv_len,
            scale=self._scale,
            sliding_window=self.config.layer_windows[index],
            out=out[:num_decodes],
        )
