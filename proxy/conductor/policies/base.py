"""What every policy is, and the questions that several of them asked."""

from __future__ import annotations

from typing import ClassVar, Protocol

from ..placement import Choice, MemberState, PlacementRequest, Snapshot


class Policy(Protocol):
    name: ClassVar[str]

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        """candidates holds at least one worker of each role. A policy's own state is plain attributes, nothing hidden."""
        ...


def usable_blocks(request: PlacementRequest, num_blocks: int, block_size: int) -> int:
    """Of num_blocks cached blocks, those that spare work: the last token is always computed, its logits give the next one."""
    return min(num_blocks, (request.num_tokens - 1) // block_size)


def cached_blocks(request: PlacementRequest, member: MemberState, block_size: int) -> int:
    """Leading blocks that the store on the member's own node spares it."""
    return usable_blocks(request, request.held_blocks.get(member.store_address, 0), block_size)


def choice_blocks(request: PlacementRequest, choice: Choice, block_size: int) -> int:
    """Leading blocks that the chosen prefill worker is spared, those of the store that it is told to load from included."""
    own = cached_blocks(request, choice.prefill, block_size)
    return own if choice.prefix is None else max(own, choice.prefix.num_blocks)


def least_outstanding(members: tuple[MemberState, ...]) -> MemberState:
    """By tokens, not by requests: one long prompt is not one short prompt. Ties go to the first id."""
    return min(members, key=lambda member: (member.num_outstanding_tokens, member.id))
