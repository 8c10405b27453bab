"""Draws one token a row of logits on the device: temperature, top-k, top-p, min-p, all without a word to the host.

row ─► maximum ─► none that is a finite number: -1
          ├─► greedy: its token
          └─► depth = (maximum − logit) / temperature  ≥ 0, so its bits are in its order
                 └─► limit: the least of those that top-k, top-p and min-p set, found by halving twice a pass over the bits
                        └─► weights exp(−depth) of depth ≤ limit, cumulated in the vocabulary's order ─► inverse at u(seed, index)

One program a row. Nothing is sorted: a limit is the smallest depth up to which enough tokens (top-k) or enough weight (top-p) lies, and
32 bits of it take 16 passes over a row that stays in the L2 cache, fewer where the search is down to a single token before.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
INFINITE = tl.constexpr(0x7F800000)  # the bits of an infinite depth: no limit
NO_TOKEN = tl.constexpr(-1)  # of kernels/reference/sampling.py
TO_UNIT = tl.constexpr(2.0**-53)


@triton.jit
def _depths(row_ptr, start, VOCAB: tl.constexpr, largest, temperature, BLOCK: tl.constexpr):
    """Depth and its bits, uint32; infinite beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    depth = (largest - logits) / temperature
    return depth, depth.to(tl.uint32, bitcast=True)


@triton.jit
def _search(row_ptr, VOCAB: tl.constexpr, largest, temperature, wanted, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest bits, at most limit, up to which the tokens (their weights where WEIGHTED) add up to wanted. Four ways a pass.

    Where a single token is left in the range, the range's end serves as well: the tokens up to it are the same.
    """
    low = tl.full([], 0, tl.uint32)
    shift = tl.full([], 30, tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    num_left = 2
    while num_left > 1:
        step = tl.full([], 1, tl.uint32) << shift
        below_1, below_2, below_3 = low + step, low + 2 * step, low + 3 * step
        sum_1 = tl.zeros([BLOCK], dtype=tl.float64 if WEIGHTED else tl.int32)
        sum_2 = tl.zeros([BLOCK], dtype=tl.float64 if WEIGHTED else tl.int32)
        sum_3 = tl.zeros([BLOCK], dtype=tl.float64 if WEIGHTED else tl.int32)
        counts = tl.zeros([BLOCK], dtype=tl.int32)  # of the four ranges, eight bits each: a lane meets fewer than 256 blocks
        for start in range(0, VOCAB, BLOCK):
            depth, bits = _depths(row_ptr, start, VOCAB, largest, temperature, BLOCK)
            inside = bits <= limit
            way = ((bits - low) >> shift).to(tl.int32)
            counts += tl.where(inside & (bits >= low) & (way < 4), tl.full([BLOCK], 1, tl.int32) << (8 * tl.minimum(way, 3)), 0)
            value = tl.exp(-depth).to(tl.float64) if WEIGHTED else tl.full([BLOCK], 1, tl.int32)
            value = tl.where(inside, value, 0)
            sum_1 += tl.where(bits < below_1, value, 0)
            sum_2 += tl.where(bits < below_2, value, 0)
            sum_3 += tl.where(bits < below_3, value, 0)
        short_1 = tl.sum(sum_1, axis=0) < wanted
        short_2 = tl.sum(sum_2, axis=0) < wanted
        short_3 = tl.sum(sum_3, axis=0) < wanted
        digit = short_1.to(tl.int32) + short_2.to(tl.int32) + short_3.to(tl.int32)
        low += digit.to(tl.uint32) * step
        num_left = tl.sum((counts >> (8 * digit)) & 0xFF, axis=0)
        num_left = tl.where(shift == 0, 0, num_left)
        shift = tl.where(shift == 0, shift, shift - 2)
    return tl.minimum(low + (step - 1), limit)


@triton.jit
def _kept(row_ptr, VOCAB: tl.constexpr, largest, temperature, limit, BLOCK: tl.constexpr):
    """The number of tokens up to limit, and their weight."""
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    weights = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, VOCAB, BLOCK):
        depth, bits = _depths(row_ptr, start, VOCAB, largest, temperature, BLOCK)
        inside = (bits <= limit) & (start + tl.arange(0, BLOCK) < VOCAB)
        counts += inside.to(tl.int32)
        weights += tl.where(inside, tl.exp(-depth).to(tl.float64), 0.0)
    return tl.sum(counts, axis=0), tl.sum(weights, axis=0)


@triton.jit
def _cumulated(row_ptr, start, VOCAB: tl.constexpr, largest, temperature, limit, BLOCK: tl.constexpr):
    """The cumulated weights of a block, −1 at tokens that have none, and their last value."""
    depth, bits = _depths(row_ptr, start, VOCAB, largest, temperature, BLOCK)
    weights = tl.where(bits <= limit, tl.exp(-depth).to(tl.float64), 0.0)
    cumulated = tl.where(weights > 0, tl.cumsum(weights, axis=0), -1.0)
    return cumulated, tl.maximum(tl.max(cumulated, axis=0), 0.0)


@triton.jit
def _uniform(seed, index):
    """As kernels/reference/philox.py draws it."""
    zero = tl.full([], 0, tl.uint32)
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * TO_UNIT


@triton.jit
def _sampling_kernel(
    logits_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, seeds_ptr, indices_ptr, out_ptr, stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_at = tl.zeros([BLOCK], dtype=tl.int32)
    odd = tl.zeros([BLOCK], dtype=tl.int32)  # lanes that have met NaN: a maximum passes over it
    for start in range(0, VOCAB, BLOCK):
        columns = start + lanes
        logits = tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        best_at = tl.where(logits > best, columns, best_at)
        best = tl.maximum(logits, best)
        odd |= (logits != logits).to(tl.int32)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, best_at, VOCAB), axis=0)
    sound = (tl.max(odd, axis=0) == 0) & (tl.abs(largest) < float("inf"))
    token = tl.where(sound, tl.minimum(token, VOCAB - 1), NO_TOKEN)
    temperature = tl.load(temperatures_ptr + row)
    if sound & (temperature > 0):
        top_k = tl.load(top_ks_ptr + row)
        top_p = tl.load(top_ps_ptr + row).to(tl.float64)
        num_wanted = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB).to(tl.int32)
        limit = tl.full([], INFINITE, tl.uint32)
        if num_wanted < VOCAB:
            limit = _search(row_ptr, VOCAB, largest, temperature, num_wanted, limit, False, BLOCK)
        if top_p < 1:
            num_kept, weight = _kept(row_ptr, VOCAB, largest, temperature, limit, BLOCK)
            # of tokens as likely as the last one of top_k, only as many count as top_k leaves room for
            surplus = tl.maximum(num_kept - num_wanted, 0).to(tl.float64)
            weight -= tl.where(surplus > 0, surplus * tl.exp(-limit.to(tl.float32, bitcast=True)).to(tl.float64), 0.0)
            limit = _search(row_ptr, VOCAB, largest, temperature, top_p * weight, limit, True, BLOCK)
        deepest = 0.0 - tl.log(tl.load(min_ps_ptr + row))
        limit = tl.minimum(limit, deepest.to(tl.uint32, bitcast=True))

        total = tl.full([], 0.0, tl.float64)
        for start in range(0, VOCAB, BLOCK):
            _, weight = _cumulated(row_ptr, start, VOCAB, largest, temperature, limit, BLOCK)
            total += weight
        target = _uniform(tl.load(seeds_ptr + row), tl.load(indices_ptr + row)) * total
        before = tl.full([], 0.0, tl.float64)
        begin = 0
        drawn = VOCAB
        while (begin < VOCAB) & (drawn == VOCAB):
            cumulated, weight = _cumulated(row_ptr, begin, VOCAB, largest, temperature, limit, BLOCK)
            beyond = (cumulated >= 0) & (before + cumulated > target)
            drawn = tl.min(tl.where(beyond, begin + lanes, VOCAB), axis=0)
            before += weight
            begin += BLOCK
        token = tl.where(drawn < VOCAB, drawn, token)
    tl.store(out_ptr + row, token.to(tl.int64))


def sampling(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """See kernels/sampling.py: logits [n, vocab_size] of any float dtype, last dimension contiguous -> int64 [n]. Safe in a CUDA graph.

    Raises ValueError for a vocabulary above 255 blocks of 4,096, more than a lane can count.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size > 255 * BLOCK:
        raise ValueError(f"sampling counts in 8 bits a lane: a vocabulary of {vocab_size} is above {255 * BLOCK}; raise BLOCK")
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        block = min(BLOCK, max(128, triton.next_power_of_2(vocab_size)))
        _sampling_kernel[(num_rows,)](
            logits, temperatures, top_ks, top_ps, min_ps, seeds, indices, out, logits.stride(0),
            VOCAB=vocab_size, BLOCK=block, num_warps=max(4, block // 256),
        )  # fmt: skip
    return out
