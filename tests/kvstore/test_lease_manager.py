"""The lease manager under every order of events: slots add up, and nobody's bytes are ever another's."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from halfmoon.kvstore.eviction import LRU
from halfmoon.kvstore.handoff import Access, HandoffId, Lease
from halfmoon.kvstore.lease_manager import LeaseManager
from halfmoon.protocol.errors import (
    HalfmoonError,
    HandoffAborted,
    HandoffIncomplete,
    InvalidRequest,
    LeaseExpired,
    PromptTooLong,
    StaleEpoch,
    StoreFull,
    StoreUnavailable,
    WorkerLost,
)
from halfmoon.protocol.v1 import common_pb2

NUM_SLOTS, NUM_LAYERS = 6, 2
REASON = WorkerLost("the test said so")
STATE = common_pb2.HandoffState(num_tokens=1)


def key(chain: str, index: int) -> bytes:
    return hashlib.blake2b(f"{chain}{index}".encode(), digest_size=16).digest()


def keys(chain: str, num_blocks: int) -> list[bytes]:
    return [key(chain, index) for index in range(num_blocks)]


class Recorder:
    """An Observer that keeps what it was told."""

    def __init__(self) -> None:
        self.visible: set[bytes] = set()
        self.ended_leases: dict[str, HalfmoonError | None] = {}
        self.ended_handoffs: dict[HandoffId, HalfmoonError | None] = {}
        self.num_room_freed = 0

    def lease_ended(self, lease_id: str, error: HalfmoonError | None) -> None:
        assert lease_id not in self.ended_leases
        self.ended_leases[lease_id] = error

    def handoff_changed(self, handoff_id: str) -> None:
        pass

    def handoff_ended(self, handoff_id: HandoffId, error: HalfmoonError | None) -> None:
        assert handoff_id not in self.ended_handoffs
        self.ended_handoffs[handoff_id] = error

    def when_untouched(self, lease_id: str, then: Callable[[], None]) -> None:
        then()

    def room_freed(self) -> None:
        self.num_room_freed += 1

    def content_changed(self, stored: list[bytes], evicted: list[bytes]) -> None:
        assert not self.visible & set(stored) and self.visible >= set(evicted)
        self.visible = self.visible - set(evicted) | set(stored)


def checksum(name: Any) -> int:
    return hash(name) & (2**64 - 1)


@dataclasses.dataclass(eq=False)
class Held:
    """A lease as the machine knows it: `names` says what the bytes of each block must be."""

    lease: Lease
    names: list[Any]
    slots: list[int]
    handoff: HandoffId | None


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0  # since tombstones were last forgotten
        self.now = 0.0
        self.seen = Recorder()
        self.manager = LeaseManager(NUM_SLOTS, NUM_LAYERS, LRU(), lambda: self.now, self.seen)
        self.memory: dict[tuple[int, int], Any] = {}
        self.held: list[Held] = []  # not yet released by its client, revoked ones included
        self.sealed: dict[HandoffId, Held] = {}
        self.num_sessions = 0
        self.sessions = {True: self.open(True), False: self.open(False)}

    def open(self, shares_arena: bool) -> str:
        self.num_sessions += 1
        session = f"{'shm' if shares_arena else 'grpc'}-{self.num_sessions}"
        self.manager.open_session(session, session, shares_arena)
        return session

    def writers(self) -> list[Held]:
        return [held for held in self.held if held.lease.access is Access.WRITE and held.lease.revoked is None]

    @rule(
        name=st.sampled_from("xyz"),
        epoch=st.integers(1, 4),
        chain=st.sampled_from("ab"),
        full=st.integers(0, 4),
        part=st.booleans(),
        shm=st.booleans(),
    )
    def reserve(self, name: str, epoch: int, chain: str, full: int, part: bool, shm: bool) -> None:
        wanted = HandoffId(name, epoch)
        try:
            lease = self.manager.try_reserve(self.sessions[shm], wanted, keys(chain, full), full + part, self.now + 10)
        except (StaleEpoch, InvalidRequest):
            return
        if lease is None:
            assert self.room() < full + part
            return
        names = [*keys(chain, full), *([wanted] if part else [])]
        self.held.append(Held(lease, names, list(lease.slots), wanted))

    @rule(chain=st.sampled_from("ab"), full=st.integers(1, 4), shm=st.booleans())
    def keep(self, chain: str, full: int, shm: bool) -> None:
        lease = self.manager.try_reserve(self.sessions[shm], None, keys(chain, full), full, self.now)
        if lease is not None:
            self.held.append(Held(lease, keys(chain, full), list(lease.slots), None))

    @precondition(lambda self: self.writers())
    @rule(data=st.data(), num_slices=st.integers(1, 8))
    def push(self, data: st.DataObject, num_slices: int) -> None:
        held = data.draw(st.sampled_from(self.writers()))
        for _ in range(num_slices):
            done = held.lease.progress.num_layers_done
            open_blocks = [block for block in range(len(done)) if done[block] < NUM_LAYERS]
            if not open_blocks:
                return
            block = open_blocks[0]
            layer = int(done[block])
            assert self.manager.push(held.lease.lease_id, layer, block, 1) == [held.slots[block]]
            self.memory[held.slots[block], layer] = held.names[block]

    @precondition(lambda self: self.writers())
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.writers()))
        complete = held.lease.progress.is_complete
        try:
            self.manager.seal(held.lease.lease_id, STATE, [checksum(name) for name in held.names])
        except HandoffIncomplete:
            assert not complete
            return
        assert complete
        self.held.remove(held)
        if held.handoff is not None:
            self.sealed[held.handoff] = held

    @rule(name=st.sampled_from("xyz"), epoch=st.integers(1, 4), shm=st.booleans())
    def fetch(self, name: str, epoch: int, shm: bool) -> None:
        wanted = HandoffId(name, epoch)
        try:
            lease = self.manager.open_fetch(self.sessions[shm], wanted)
        except (StaleEpoch, InvalidRequest):
            return
        if lease is None:
            return
        source = self.sealed.get(wanted) or next(held for held in self.writers() if held.handoff == wanted)
        self.held.append(Held(lease, source.names, list(lease.slots), wanted))

    @rule(chain=st.sampled_from("ab"), full=st.integers(1, 4), shm=st.booleans())
    def fetch_prefix(self, chain: str, full: int, shm: bool) -> None:
        expected = 0
        while expected < full and key(chain, expected) in self.seen.visible:
            expected += 1
        lease = self.manager.fetch_prefix(self.sessions[shm], keys(chain, full))
        assert len(lease.slots) == expected
        self.held.append(Held(lease, keys(chain, expected), list(lease.slots), None))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), corrupt=st.booleans())
    def release(self, data: st.DataObject, corrupt: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.manager.release(held.lease.lease_id, [0] if corrupt else [])
        self.held.remove(held)
        self.manager.release(held.lease.lease_id)  # twice is as well

    @rule(name=st.sampled_from("xyz"), epoch=st.integers(1, 4))
    def abort(self, name: str, epoch: int) -> None:
        self.manager.abort(HandoffId(name, epoch), REASON)
        with pytest.raises(StaleEpoch):
            self.manager.check_epoch(HandoffId(name, epoch))

    @rule(name=st.sampled_from("xyz"), epoch=st.integers(1, 4))
    def expire(self, name: str, epoch: int) -> None:
        self.manager.expire_handoff(HandoffId(name, epoch))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def zombie_write(self, data: st.DataObject) -> None:
        """A client of the arena that has not heard yet that its lease was revoked finishes its copy."""
        held = data.draw(st.sampled_from(self.held))
        writes = held.lease.access is Access.WRITE and held.lease.client.shares_arena and held.lease.revoked is not None
        for block, slot in enumerate(held.slots):
            if writes and not held.lease.present[block]:
                for layer in range(int(held.lease.progress.num_layers_done[block]), NUM_LAYERS):
                    self.memory[slot, layer] = "garbage"

    @rule(shm=st.booleans())
    def end_session(self, shm: bool) -> None:
        ended = self.sessions[shm]
        self.manager.end_session(ended, "went away")
        self.held = [held for held in self.held if held.lease.client.session_id != ended]
        self.sessions[shm] = self.open(shm)

    @rule(seconds=st.floats(0, 2000))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds
        if self.waited >= 900:  # tombstones are forgotten: the epochs may be used again
            self.waited = 0.0
            self.seen.ended_handoffs.clear()

    def live_handoffs(self) -> list[Held]:
        ended = self.seen.ended_handoffs
        for handoff_id in [found for found in self.sealed if found in ended]:
            del self.sealed[handoff_id]
        return list(self.sealed.values())

    def pinned(self) -> set[int]:
        found = {slot for held in self.live_handoffs() for slot in held.slots}
        for held in self.held:
            if held.lease.revoked is None or held.lease.client.shares_arena:
                found.update(held.slots)
        return found

    def room(self) -> int:
        return NUM_SLOTS - len(self.pinned())

    @invariant()
    def slots_add_up(self) -> None:
        pinned = self.pinned()
        content = self.manager.content
        cached = {content.slot(found) for found in content.keys()} - pinned
        assert self.manager.accounting() == (NUM_SLOTS, len(pinned), len(cached), NUM_SLOTS - len(pinned) - len(cached))

    @invariant()
    def what_is_visible_is_what_was_announced(self) -> None:
        assert set(self.manager.content.keys()) == self.seen.visible

    @invariant()
    def everything_readable_holds_its_own_bytes(self) -> None:
        for found in self.seen.visible:
            slot = self.manager.content.slot(found)
            assert slot is not None and self.manager.content.checksum(slot) == checksum(found)
            assert all(self.memory[slot, layer] == found for layer in range(NUM_LAYERS))
        for held in [*self.live_handoffs(), *(held for held in self.held if held.lease.revoked is None)]:
            for block, (slot, name) in enumerate(zip(held.slots, held.names, strict=True)):
                for layer in range(int(held.lease.progress.num_layers_done[block])):
                    assert self.memory[slot, layer] == name

    @invariant()
    def an_open_lease_of_a_hand_off_belongs_to_a_live_one(self) -> None:
        for held in self.held:
            if held.handoff is not None and held.lease.revoked is None:
                assert self.manager.end_reason(held.handoff) is None


# the machine reads ended_handoffs to know which sealed ones are over; an epoch can't come back within the tombstones' time
StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestStoreMachine = StoreMachine.TestCase


@pytest.fixture
def managed() -> tuple[LeaseManager, Recorder]:
    recorder = Recorder()
    manager = LeaseManager(NUM_SLOTS, NUM_LAYERS, LRU(), lambda: 0.0, recorder)
    manager.open_session("shm", "prefill-0", True)
    manager.open_session("grpc", "decode-0", False)
    return manager, recorder


def write_all(manager: LeaseManager, lease: Lease) -> None:
    for layer in range(NUM_LAYERS):
        manager.push(lease.lease_id, layer, 0, len(lease.slots))


def test_the_slots_of_a_revoked_shm_lease_are_not_given_to_anyone(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    lease = manager.try_reserve("shm", HandoffId("r", 1), [], 1, 10)
    assert lease is not None
    manager.abort(HandoffId("r", 1), REASON)
    assert manager.accounting().num_leased == 1
    assert "the test said so" in str(recorder.ended_leases[lease.lease_id])
    assert manager.try_reserve("grpc", None, keys("a", 6), 6, 10) is None
    manager.release(lease.lease_id)
    assert manager.try_reserve("grpc", None, keys("a", 6), 6, 10) is not None


def test_the_slots_of_a_revoked_grpc_lease_are_free_at_once(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    lease = manager.try_reserve("grpc", HandoffId("r", 1), [], 1, 10)
    assert lease is not None
    manager.abort(HandoffId("r", 1), REASON)
    assert manager.accounting().num_free == NUM_SLOTS and recorder.num_room_freed == 1
    with pytest.raises(HandoffAborted, match="the test said so"):
        manager.push(lease.lease_id, 0, 0, 1)
    with pytest.raises(HandoffAborted, match="the test said so"):
        manager.seal(lease.lease_id, STATE, [1])


def test_a_session_that_ends_with_its_store_gives_nothing_up(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    lease = manager.try_reserve("grpc", HandoffId("r", 1), [], 1, 10)
    assert lease is not None
    manager.end_session("grpc", "lost its store, which stopped,", StoreUnavailable("store s stopped"))
    assert isinstance(lease.revoked, StoreUnavailable) and isinstance(recorder.ended_leases[lease.lease_id], StoreUnavailable)
    assert manager.num_handoffs == 0 and manager.accounting().num_free == NUM_SLOTS


def test_an_abort_leaves_a_later_epoch_alone(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    lease = manager.try_reserve("shm", HandoffId("h", 2), [], 1, 0)
    assert lease is not None
    assert manager.abort(HandoffId("h", 1), REASON) is False
    assert lease.revoked is None and manager.num_handoffs == 1 and recorder.ended_handoffs == {}
    assert manager.abort(HandoffId("h", 2), REASON) is True


def test_a_present_block_that_was_dropped_as_corrupt_is_not_found_again_by_the_seal(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    first = manager.try_reserve("shm", None, keys("a", 1), 1, 0)
    assert first is not None
    manager.push(first.lease_id, 0, 0, 1, NUM_LAYERS)
    manager.seal(first.lease_id, STATE, [1])
    second = manager.try_reserve("shm", None, keys("a", 1), 1, 0)
    assert second is not None and second.present == [True]
    reader = manager.fetch_prefix("grpc", keys("a", 1))
    manager.release(reader.lease_id, corrupt_blocks=[0])
    manager.seal(second.lease_id, STATE, [1])
    assert manager.content.find_run(keys("a", 1)) == [] and recorder.visible == set()
    assert manager.accounting().num_free == NUM_SLOTS


def test_push_refuses_a_present_block(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, _ = managed
    first = manager.try_reserve("shm", None, keys("a", 1), 1, 10)
    assert first is not None
    write_all(manager, first)
    manager.seal(first.lease_id, STATE, [1])
    second = manager.try_reserve("shm", HandoffId("r", 1), keys("a", 1), 2, 10)
    assert second is not None and second.present == [True, False]
    with pytest.raises(InvalidRequest, match="block 0, which has 2 of 2 layers"):
        manager.push(second.lease_id, 0, 0, 2)


def test_a_seal_needs_a_checksum_for_each_block(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, _ = managed
    lease = manager.try_reserve("shm", None, keys("a", 2), 2, 10)
    assert lease is not None
    write_all(manager, lease)
    with pytest.raises(InvalidRequest, match="1 checksums for 2 blocks"):
        manager.seal(lease.lease_id, STATE, [1])


def test_requests_that_can_never_work_are_refused(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, _ = managed
    with pytest.raises(PromptTooLong, match="7 blocks can never fit: the arena has 6 slots"):
        manager.try_reserve("shm", HandoffId("r", 1), keys("a", 7), 7, 10)
    with pytest.raises(StoreFull, match="7 blocks can never fit"):
        manager.try_reserve("shm", None, keys("a", 7), 7, 10)
    with pytest.raises(InvalidRequest, match="3 blocks with 1 keys"):
        manager.try_reserve("shm", HandoffId("r", 1), keys("a", 1), 3, 10)
    with pytest.raises(InvalidRequest, match="2 blocks with 1 keys"):
        manager.try_reserve("shm", None, keys("a", 1), 2, 10)
    with pytest.raises(InvalidRequest, match="has 3 bytes"):
        manager.try_reserve("shm", None, [b"abc"], 1, 10)
    with pytest.raises(LeaseExpired, match="attach again"):
        manager.try_reserve("nobody", None, keys("a", 1), 1, 10)
    with pytest.raises(LeaseExpired, match="no lease 'nothing'"):
        manager.push("nothing", 0, 0, 1)


def test_a_hand_off_that_nobody_reads_expires_and_one_that_is_read_does_not(managed: tuple[LeaseManager, Recorder]) -> None:
    manager, recorder = managed
    for name in "xy":
        lease = manager.try_reserve("shm", HandoffId(name, 1), [], 1, 10)
        assert lease is not None
        write_all(manager, lease)
        manager.seal(lease.lease_id, STATE, [1])
    manager.open_fetch("grpc", HandoffId("y", 1))
    manager.expire_handoff(HandoffId("x", 1))
    manager.expire_handoff(HandoffId("y", 1))
    assert list(recorder.ended_handoffs) == [HandoffId("x", 1)]
    assert manager.num_expired_leases == 1 and manager.accounting().num_leased == 1


uses = st.lists(st.tuples(st.sampled_from(["keep", "keep", "hold", "release"]), st.sampled_from("abc"), st.integers(1, 6)), max_size=25)


@given(uses)
@settings(max_examples=200)
def test_the_end_of_a_chain_goes_before_its_start_and_what_fits_is_what_can_be_reserved(found: list[tuple[str, str, int]]) -> None:
    """Who reads chains by bisection relies on it: a store holds no block without those before it."""
    recorder = Recorder()
    manager = LeaseManager(NUM_SLOTS, NUM_LAYERS, LRU(), lambda: 0.0, recorder)
    manager.open_session("grpc", "grpc", False)
    held: list[Lease] = []
    for action, chain, full in found:
        if action == "keep":
            num_blocks = manager.num_fitting(keys(chain, full))
            if num_blocks < full:
                assert manager.try_reserve("grpc", None, keys(chain, num_blocks + 1), num_blocks + 1, 0.0) is None
            lease = manager.try_reserve("grpc", None, keys(chain, num_blocks), num_blocks, 0.0)
            assert lease is not None
            for block, present in enumerate(lease.present):
                for layer in range(0 if present else NUM_LAYERS):
                    manager.push(lease.lease_id, layer, block, 1)
            manager.seal(lease.lease_id, STATE, [0] * num_blocks)
        elif action == "hold":
            held.append(manager.fetch_prefix("grpc", keys(chain, full)))
        elif held:
            manager.release(held.pop(full % len(held)).lease_id)
        for name in "abc":
            visible = [key(name, index) in recorder.visible for index in range(NUM_SLOTS)]
            assert visible == sorted(visible, reverse=True)
