"""The workers that may be chosen, as columns: a row a worker, an array a number.

MemberStates ─► Pool.of                  the live cluster ─► its own columns, changed in place                pool[row] ─► MemberState
A placement looks at every worker. Over arrays that takes microseconds; over a thousand objects it takes a millisecond.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ...protocol.timing.step_limits import StepLimits
from .member_state import DECODES_ITS_OWN, MemberState

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
NOTHING: Mapping[str, int] = MappingProxyType({})


class Roster:
    """Who the rows are. Constant, so that what is derived from it is derived once."""

    def __init__(
        self,
        ids: Iterable[str],
        incarnations: Iterable[str],
        store_addresses: Iterable[str],
        roles: Iterable[str],
        limits: Iterable[StepLimits],
    ) -> None:
        self.ids = tuple(ids)
        self.incarnations = tuple(incarnations)
        self.store_addresses = tuple(store_addresses)
        self.roles = tuple(roles)
        self.limits = tuple(limits)
        self._joined: tuple[Roster, Roster] | None = None  # the last other, and what came of it

    @cached_property
    def by_id(self) -> list[tuple[str, int]]:
        """(id, row), sorted."""
        return sorted(zip(self.ids, range(len(self.ids)), strict=True))

    @cached_property
    def store_set(self) -> frozenset[str]:
        return frozenset(self.store_addresses)

    @cached_property
    def ranks(self) -> Ints:
        """Of each row's id among all ids."""
        ranks = np.empty(len(self.ids), np.int64)
        ranks[[row for _, row in self.by_id]] = np.arange(len(self.ids))
        return ranks

    @cached_property
    def role_names(self) -> frozenset[str]:
        return frozenset(self.roles)

    @cached_property
    def stores(self) -> tuple[list[str], Ints, Ints]:
        """The different live stores' addresses, the rows that have one, and which."""
        addresses = [address for address in dict.fromkeys(self.store_addresses) if address]
        place = {address: at for at, address in enumerate(addresses)}
        rows = [row for row, address in enumerate(self.store_addresses) if address]
        return addresses, np.array(rows, np.int64), np.array([place[self.store_addresses[row]] for row in rows], np.int64)

    @cached_property
    def decodes_its_own(self) -> Bools:
        """Who decodes what it prefills."""
        return np.array([one in DECODES_ITS_OWN for one in self.roles], np.bool_)

    @cached_property
    def max_step_tokens(self) -> Floats:
        """Of chunks in a step, where nobody decodes."""
        return np.array([one.max_tokens for one in self.limits], np.float64)

    @cached_property
    def max_tokens_beside(self) -> Floats:
        """Where somebody does."""
        return np.array([min(one.max_tokens_beside, one.max_tokens) for one in self.limits], np.float64)

    def take(self, rows: list[int]) -> Roster:
        columns = [[column[row] for row in rows] for column in self._columns()]
        return Roster(*columns, limits=[self.limits[row] for row in rows])

    def join(self, other: Roster) -> Roster:
        if self._joined is None or self._joined[0] is not other:
            columns = zip(self._columns(), other._columns(), strict=True)
            self._joined = other, Roster(*(mine + theirs for mine, theirs in columns), limits=self.limits + other.limits)
        return self._joined[1]

    def _columns(self) -> tuple[tuple[str, ...], ...]:
        return self.ids, self.incarnations, self.store_addresses, self.roles


@dataclass(slots=True, eq=False)
class Pool:
    """Shapes are [workers]. The columns mean what MemberState's fields mean."""

    roster: Roster
    num_outstanding_tokens: Ints
    kv_capacity_tokens: Ints
    busy_until_s: Floats  # NaN: not told
    num_requests: Ints
    num_running: Ints
    num_running_tokens: Ints
    num_ahead_tokens: Floats
    num_behind_tokens: Floats
    behind_s: Floats
    # of the request to be placed; None: not looked up yet
    num_held_blocks: Ints | None = None  # leading ones in the worker's pages, or in its own store
    num_page_blocks: Ints | None = None  # leading ones in its pages

    @classmethod
    def of(cls, states: Iterable[MemberState]) -> Pool:
        members = tuple(states)
        return cls(
            Roster(
                [one.id for one in members],
                [one.incarnation for one in members],
                [one.store_address for one in members],
                [one.role for one in members],
                [one.limits for one in members],
            ),
            np.array([one.num_outstanding_tokens for one in members], np.int64),
            np.array([one.kv_capacity_tokens for one in members], np.int64),
            np.array([math.nan if one.busy_until_s is None else one.busy_until_s for one in members], np.float64),
            np.array([one.num_requests for one in members], np.int64),
            np.array([one.num_running for one in members], np.int64),
            np.array([one.num_running_tokens for one in members], np.int64),
            np.array([one.num_ahead_tokens for one in members], np.float64),
            np.array([one.num_behind_tokens for one in members], np.float64),
            np.array([one.behind_s for one in members], np.float64),
        )

    def __len__(self) -> int:
        return len(self.roster.ids)

    def __getitem__(self, row: int) -> MemberState:
        roster, busy_until_s = self.roster, float(self.busy_until_s[row])
        return MemberState(
            roster.ids[row],
            roster.incarnations[row],
            roster.store_addresses[row],
            int(self.num_outstanding_tokens[row]),
            int(self.kv_capacity_tokens[row]),
            None if math.isnan(busy_until_s) else busy_until_s,
            int(self.num_requests[row]),
            int(self.num_running[row]),
            int(self.num_running_tokens[row]),
            roster.roles[row],
            float(self.num_ahead_tokens[row]),
            float(self.num_behind_tokens[row]),
            float(self.behind_s[row]),
            roster.limits[row],
        )

    def __iter__(self) -> Iterator[MemberState]:
        return map(self.__getitem__, range(len(self)))

    def take(self, rows: Ints) -> Pool:
        """A copy of some rows, in their order."""
        held, in_pages = self.num_held_blocks, self.num_page_blocks
        return Pool(
            self.roster.take(rows.tolist()),
            self.num_outstanding_tokens[rows],
            self.kv_capacity_tokens[rows],
            self.busy_until_s[rows],
            self.num_requests[rows],
            self.num_running[rows],
            self.num_running_tokens[rows],
            self.num_ahead_tokens[rows],
            self.num_behind_tokens[rows],
            self.behind_s[rows],
            None if held is None else held[rows],
            None if in_pages is None else in_pages[rows],
        )

    def keep(self, wanted: Bools) -> Pool:
        """The pool itself where all are wanted."""
        return self if wanted.all() else self.take(np.flatnonzero(wanted))

    def with_role(self, role: str) -> Pool:
        return self._of_roles({role})

    def without_role(self, role: str) -> Pool:
        return self._of_roles(self.roster.role_names - {role})

    def without(self, incarnations: frozenset[str]) -> Pool:
        if incarnations.isdisjoint(self.roster.incarnations):
            return self
        return self.keep(np.fromiter((one not in incarnations for one in self.roster.incarnations), bool, len(self)))

    def join(self, other: Pool) -> Pool:
        """The rows of both, this pool's first."""
        return Pool(
            self.roster.join(other.roster),
            np.concatenate((self.num_outstanding_tokens, other.num_outstanding_tokens)),
            np.concatenate((self.kv_capacity_tokens, other.kv_capacity_tokens)),
            np.concatenate((self.busy_until_s, other.busy_until_s)),
            np.concatenate((self.num_requests, other.num_requests)),
            np.concatenate((self.num_running, other.num_running)),
            np.concatenate((self.num_running_tokens, other.num_running_tokens)),
            np.concatenate((self.num_ahead_tokens, other.num_ahead_tokens)),
            np.concatenate((self.num_behind_tokens, other.num_behind_tokens)),
            np.concatenate((self.behind_s, other.behind_s)),
            _both(self.num_held_blocks, other.num_held_blocks),
            _both(self.num_page_blocks, other.num_page_blocks),
        )

    def with_held(self, held_blocks: Mapping[str, int], page_blocks: Mapping[str, int] = NOTHING) -> Pool:
        """held_blocks: store address -> leading blocks of the request that it holds. page_blocks: worker id -> those in its pages."""
        if self.num_held_blocks is not None:
            return self
        in_pages, held = self.in_pages(page_blocks), self.held(held_blocks, page_blocks)
        return dataclasses.replace(self, num_held_blocks=held, num_page_blocks=in_pages)

    def held(self, held_blocks: Mapping[str, int], page_blocks: Mapping[str, int] = NOTHING) -> Ints:
        """In the worker's pages or its own store, whichever has more."""
        if self.num_held_blocks is not None:
            return self.num_held_blocks
        in_pages = self.in_pages(page_blocks)
        if self.roster.store_set.isdisjoint(held_blocks):
            return in_pages
        in_store = np.fromiter(map(held_blocks.get, self.roster.store_addresses, repeat(0)), np.int64, len(self))
        return np.maximum(in_store, in_pages) if page_blocks else in_store

    def in_pages(self, page_blocks: Mapping[str, int]) -> Ints:
        if self.num_page_blocks is not None:
            return self.num_page_blocks
        if not page_blocks:
            return np.zeros(len(self), np.int64)
        return np.fromiter(map(page_blocks.get, self.roster.ids, repeat(0)), np.int64, len(self))

    def least(self, values: Ints | Floats) -> int:
        """The row with the least value; of equals the one whose id comes first."""
        rows = np.flatnonzero(values == values.min())
        return int(rows[0] if len(rows) == 1 else rows[self.roster.ranks[rows].argmin()])

    def row_of(self, worker_id: str) -> int | None:
        by_id = self.roster.by_id
        at = bisect_left(by_id, (worker_id, 0))
        return by_id[at][1] if at < len(by_id) and by_id[at][0] == worker_id else None

    def after(self, worker_id: str) -> int:
        """The row of the next id in order; of the first one behind the last."""
        by_id = self.roster.by_id
        at = bisect_right(by_id, (worker_id, len(by_id)))
        return by_id[at % len(by_id)][1]

    def _of_roles(self, roles: Iterable[str]) -> Pool:
        names, wanted = self.roster.role_names, frozenset(roles)
        if names <= wanted:
            return self
        return self.take(np.flatnonzero(np.fromiter((one in wanted for one in self.roster.roles), bool, len(self))))


def _both(mine: Ints | None, theirs: Ints | None) -> Ints | None:
    return None if mine is None or theirs is None else np.concatenate((mine, theirs))


def total(values: Floats) -> float:
    """Added up in order, as a loop does it: a pairwise sum differs in the last bit, and so may a decision."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0
