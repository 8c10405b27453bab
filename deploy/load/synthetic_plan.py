"""Requests of drawn lengths: a share of each prompt in common with a group, and conversations of several turns.

prompt of turn t = [group's shared prefix][own][answer 1, as drawn][own][answer 2] … [own]

Turns come at drawn times, whether or not the answer before has come. The history holds drawn answers and not the server's. So the
requests are the same for every server, and the load stays open.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ...protocol.errors import ConfigError
from .arrivals import unit_arrivals
from .lengths import Lengths
from .plan import Plan, PlannedRequest, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    num_requests: int
    input_len: str = "512"
    output_len: str = "128"
    process: str = "poisson"
    burstiness: float = 1.0
    shared_share: float = 0.0
    """The share of a first turn's prompt that it has in common with its group."""
    num_groups: int = 1
    turns: int = 1
    turn_gap: float = 10.0
    """Mean time between two turns of a conversation, in mean gaps between requests, so that it scales with the rate as arrivals do."""
    max_input: int = 131072
    max_output: int = 131072
    num_warm_up: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.shared_share <= 1.0:
            raise ConfigError(f"the shared share of a prompt is {self.shared_share}; it must be from 0 to 1")
        if min(self.num_requests, self.turns, self.num_groups) < 1:
            raise ConfigError(f"{self.num_requests} requests, {self.turns} turns, {self.num_groups} groups; each must be at least 1")


def synthetic_plan(options: SyntheticOptions) -> Plan:
    """Raises ConfigError for lengths or arrivals that cannot be read."""
    requests = _requests(options, options.num_requests, options.seed, first_key=1)
    # keys of their own, so that a warm-up leaves only the groups' prefixes in the caches
    warm = _requests(options, options.num_warm_up, options.seed + 1_000_003, first_key=1 << 40) if options.num_warm_up else ()
    return Plan("rate", requests, warm, {"load": "synthetic", **dataclasses.asdict(options)})


def _requests(options: SyntheticOptions, num_requests: int, seed: int, first_key: int) -> tuple[PlannedRequest, ...]:
    rng = np.random.default_rng((seed, 0x5))
    num_sessions = math.ceil(num_requests / options.turns)
    input_lens = Lengths.parse(options.input_len).draw(num_sessions * options.turns, rng, options.max_input)
    output_lens = Lengths.parse(options.output_len).draw(num_sessions * options.turns, rng, options.max_output)
    # sessions begin at such a rate that all turns together come at one a second
    starts = unit_arrivals(options.process, num_sessions, seed, options.burstiness) * options.turns
    pauses = rng.exponential(options.turn_gap, (num_sessions, options.turns))
    groups = rng.integers(options.num_groups, size=num_sessions)
    made: list[PlannedRequest] = []
    keys = iter(range(first_key, first_key + 4 * len(input_lens)))
    for session in range(num_sessions):
        lens = input_lens[session * options.turns :][: options.turns]
        num_shared = round(options.shared_share * float(lens[0]))
        history = [Segment(-1 - int(groups[session]), num_shared)] if num_shared else []
        arrival_s = float(starts[session])
        for turn in range(options.turns):
            num_new = int(lens[turn]) - (num_shared if turn == 0 else 0)
            history = [*history, Segment(next(keys), num_new)] if num_new else history
            num_output = int(output_lens[session * options.turns + turn])
            request = PlannedRequest(arrival_s, tuple(history), num_output)
            if request.num_input_tokens > options.max_input:
                break  # the conversation has outgrown the limit
            made.append(request)
            history = [*history, Segment(next(keys), num_output)]
            arrival_s += float(pauses[session, turn])
    return tuple(sorted(made, key=lambda request: request.arrival_s)[:num_requests])
