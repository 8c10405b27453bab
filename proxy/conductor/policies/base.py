"""What every policy is, and the questions that several of them ask.

A policy is one file of this folder and its line in POLICIES. What it can do beside select() it says itself, in flags.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np

from ..member_state import MemberState
from ..placement import NO_SLO, PlacementRequest, Selection, Slo, Snapshot
from ..pool import Floats, Ints, Pool
from ..predictors.timing import Predictors
from ..queue_order import Order

_FAR = 2**31  # more blocks than any request has


class PolicySettings(NamedTuple):
    """What a policy may be made of; each takes what it needs."""

    rng: random.Random
    predictors: Predictors
    slo: Slo = NO_SLO  # of requests that bring none
    balancing_threshold: float = 1.0
    local_prefill: bool = True  # workers that decode may compute prompts, too


RoleCause = Literal["unknown_load", "slo", "missing_role"]
NOBODY: frozenset[str] = frozenset()


class RoleChange(NamedTuple):
    member_id: str
    role: Literal["prefill", "decode"]
    cause: RoleCause
    reason: str  # for people


class RolePlanner(Protocol):
    """What a policy offers that gives workers their roles."""

    def select_decode(self, request: PlacementRequest, candidates: Snapshot) -> tuple[MemberState, float]:
        """The decode worker, selected when the prefill begins; and its predicted step with the request."""
        ...

    def observe_arrival(self, request: PlacementRequest, snapshot: Snapshot) -> None:
        """A request was placed, or refused for its SLO. Once for each time that its prompt is to be computed."""
        ...

    def observe_end(self, num_output_tokens: int) -> None:
        """A request has got so many tokens, and its last."""
        ...

    def deliberate(self, snapshot: Snapshot, fixed: frozenset[str] = NOBODY) -> Generator[None, None, tuple[RoleChange, ...]]:
        """Who changes its role now. To be asked about once a second; snapshot.decode holds every worker.

        It yields between pieces of work of less than a millisecond, so that an event loop can serve others. fixed: ids of workers that
        can't change.
        """
        ...


class Policy(ABC):
    """A policy's own state is plain attributes, nothing hidden."""

    __slots__ = ()
    name: ClassVar[str]
    fetches: ClassVar[bool] = False
    """A prefill worker may load a prefix from another node's store."""
    weighs_local: ClassVar[bool] = False
    """It weighs a decode worker's own prefill against the prefill workers', and so is shown both kinds."""
    plans_roles: ClassVar[bool] = False
    """It changes workers' roles: `roles` is not None."""
    order: ClassVar[Order] = "short"
    """Of prefill queues, where nothing else is asked for."""

    @classmethod
    @abstractmethod
    def create(cls, settings: PolicySettings) -> Self: ...

    @abstractmethod
    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        """candidates holds at least one worker of each role."""
        ...

    @property
    def roles(self) -> RolePlanner | None:
        return None


def rebalance(roles: RolePlanner, snapshot: Snapshot) -> tuple[RoleChange, ...]:
    """The whole deliberation at once."""
    thinking = roles.deliberate(snapshot)
    while True:
        try:
            next(thinking)
        except StopIteration as decided:
            return decided.value


def usable_blocks(request: PlacementRequest, num_blocks: int, block_size: int) -> int:
    """Of num_blocks cached blocks, those that spare work: the last token is always computed, its logits give the next one."""
    return min(num_blocks, (request.num_tokens - 1) // block_size)


def cached_blocks(request: PlacementRequest, member: MemberState, block_size: int) -> int:
    """Leading blocks that the member's pages or the store on its own node spare it."""
    num_held = max(request.held_blocks.get(member.store_address, 0), request.page_blocks.get(member.id, 0))
    return usable_blocks(request, num_held, block_size)


def known_blocks(request: PlacementRequest, block_size: int) -> int:
    """Leading blocks that somebody has, in pages or in a store."""
    return usable_blocks(request, max((*request.held_blocks.values(), *request.page_blocks.values()), default=0), block_size)


def page_blocks(request: PlacementRequest, member: MemberState, block_size: int) -> int:
    """Of these, those in its pages: nobody has to load them."""
    return usable_blocks(request, request.page_blocks.get(member.id, 0), block_size)


class OwnBlocks(NamedTuple):
    """Usable leading blocks of a request. [workers] each."""

    held: Ints  # in the worker's pages or its own store
    in_pages: Ints

    @property
    def ranks(self) -> Ints:
        """More where more is held; of equals, where more of it is in pages."""
        return self.held * _FAR + self.in_pages

    def costs(self, cost: Callable[[int, int], float]) -> Floats:
        """cost(held, in pages) of each worker, asked once for each different pair."""
        if not self.in_pages.any():
            return cost_by_blocks(self.held, lambda held: cost(held, 0))
        different, rows = np.unique(self.ranks, return_inverse=True)
        return np.array([cost(*divmod(rank, _FAR)) for rank in different.tolist()])[rows]


def own_blocks(request: PlacementRequest, pool: Pool, block_size: int) -> OwnBlocks:
    most = usable_blocks(request, _FAR - 1, block_size)
    held = pool.held(request.held_blocks, request.page_blocks)
    return OwnBlocks(np.minimum(held, most), np.minimum(pool.in_pages(request.page_blocks), most))


def selected_blocks(request: PlacementRequest, selection: Selection, block_size: int) -> int:
    """Leading blocks that the selected prefill worker is spared, those of the store that it is told to load from included."""
    own = cached_blocks(request, selection.prefill, block_size)
    return own if selection.prefix is None else max(own, selection.prefix.num_blocks)


def best_prefix(request: PlacementRequest, block_size: int) -> tuple[str, int]:
    """The store with the longest prefix (of equals the least on SSD, then the first address), and the usable part of it in blocks."""
    held = request.held_blocks
    if not held:
        return "", 0
    most = max(held.values())
    holders = [store for store, num_blocks in held.items() if num_blocks == most]
    if request.ssd_blocks:
        return min(holders, key=lambda store: (request.ssd_blocks.get(store, 0), store)), usable_blocks(request, most, block_size)
    return min(holders), usable_blocks(request, most, block_size)


def cost_by_blocks(num_blocks: Ints, cost: Callable[[int], float]) -> Floats:
    """cost of each entry, asked once for each different one: workers hold few different prefixes of one request."""
    first = int(num_blocks[0])
    if (num_blocks == first).all():
        return np.full(len(num_blocks), cost(first))
    different = np.flatnonzero(np.bincount(num_blocks))
    costs = np.zeros(int(different[-1]) + 1)
    costs[different] = [cost(entry) for entry in different.tolist()]
    return costs[num_blocks]


def least_outstanding(pool: Pool) -> MemberState:
    """By tokens, not by requests: one long prompt is not one short prompt. Ties go to the first id."""
    return pool[pool.least(pool.num_outstanding_tokens)]
