"""What it takes to load a request's prefix from where it stands, and whether that beats computing it.

pages: nothing ─► own store's DRAM: transfer ─► its SSD: ssd besides ─► another store: transfer by its link, and its ssd
What is not worth loading counts as not held: the policies never see it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..placement import PlacementRequest, SsdVerdict
from ..pool import Floats, Pool
from ..predictors.timing import Predictors
from .base import OwnBlocks, usable_blocks


def weigh(predictors: Predictors, request: PlacementRequest, block_size: int) -> PlacementRequest:
    """Decides for each store with blocks on SSD alone whether they are loaded. Weighing twice changes nothing.

    The prompt is taken to be computed alone: a worker that computes it beside others takes longer.
    """
    if not request.ssd_blocks:
        return request
    held, on_ssd, verdicts = dict(request.held_blocks), dict(request.ssd_blocks), dict(request.ssd_verdicts)
    transfer, block_bytes = predictors.transfer, block_size * predictors.model.kv_bytes_per_token
    for store, num_ssd in request.ssd_blocks.items():
        num_dram = held[store] - num_ssd
        last = usable_blocks(request, held[store], block_size)
        first = min(num_dram, last)
        load_s = predictors.ssd.predict((last - first) * block_bytes, store)
        load_s += transfer.own(last * block_bytes) - transfer.own(first * block_bytes)
        saved_s = _saved_s(predictors, request, first, last, block_size)
        verdicts[store] = verdict = SsdVerdict(num_ssd, load_s, saved_s)
        if not verdict.loads:
            del on_ssd[store]
            held[store] = num_dram
            if not num_dram:
                del held[store]
    return dataclasses.replace(request, held_blocks=held, ssd_blocks=on_ssd, ssd_verdicts=verdicts)


def ssd_times(predictors: Predictors, request: PlacementRequest, pool: Pool, own_of: OwnBlocks, block_size: int) -> Floats:
    """Seconds that each worker's own store reads from SSD for it. [workers]"""
    found = np.zeros(len(pool))
    if request.ssd_blocks:
        for row, store in enumerate(pool.roster.store_addresses):
            if store in request.ssd_blocks:
                found[row] = own_ssd_s(predictors, request, store, int(own_of.in_pages[row]), block_size)
    return found


def own_ssd_s(predictors: Predictors, request: PlacementRequest, store: str, num_in_pages: int, block_size: int) -> float:
    """The same of one worker, which has num_in_pages leading blocks already."""
    num_ssd = request.ssd_blocks.get(store, 0)
    if not num_ssd:
        return 0.0
    num_held = usable_blocks(request, request.held_blocks[store], block_size)
    num_read = num_held - max(num_in_pages, request.held_blocks[store] - num_ssd)
    return predictors.ssd.predict(num_read * block_size * predictors.model.kv_bytes_per_token, store)


def fetch_s(predictors: Predictors, request: PlacementRequest, holder: str, own: int, best: int, block_size: int) -> float:
    """Seconds in which the blocks from own to best come from another store, holder."""
    num_bytes = (best - own) * block_size * predictors.model.kv_bytes_per_token
    return predictors.transfer.predict(num_bytes) + fetched_ssd_s(predictors, request, holder, own, best, block_size)


def fetched_ssd_s(predictors: Predictors, request: PlacementRequest, holder: str, own: int, best: int, block_size: int) -> float:
    """Of these, the holder's reads from its SSD."""
    num_ssd = min(request.ssd_blocks.get(holder, 0), best - own)
    return predictors.ssd.predict(num_ssd * block_size * predictors.model.kv_bytes_per_token, holder)


def fetch_pays(predictors: Predictors, request: PlacementRequest, holder: str, own: int, best: int, block_size: int) -> bool:
    """True if a worker with own blocks gets those up to best from the holder sooner than it computes them."""
    if best <= own:
        return False
    return fetch_s(predictors, request, holder, own, best, block_size) <= _saved_s(predictors, request, own, best, block_size)


def _saved_s(predictors: Predictors, request: PlacementRequest, first: int, last: int, block_size: int) -> float:
    """Seconds of prefill that the blocks from first to last spare, those before them being there."""
    prefill, num_tokens = predictors.prefill, request.num_tokens
    before, behind = first * block_size, last * block_size
    return prefill.predict(num_tokens - before, before) - prefill.predict(num_tokens - behind, behind)
