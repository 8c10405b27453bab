"""Chooses the endpoint of each request. One object for each run knows what is under way and what each endpoint has seen."""

from __future__ import annotations

from ...protocol.errors import ConfigError
from .plan import BLOCK_SIZE, LoadRequest


class Balancer:
    """Round robin, and the base of the others."""

    def __init__(self, num_endpoints: int) -> None:
        self._num_endpoints = num_endpoints
        self._next = 0

    def pick(self, request: LoadRequest) -> int:
        chosen = self._next
        self._next = (chosen + 1) % self._num_endpoints
        return chosen

    def ended(self, request: LoadRequest, endpoint: int) -> None:
        """A request at this endpoint is over."""


class LeastOutstanding(Balancer):
    """Picks the endpoint with the fewest tokens of prompts and answers under way; the first of equals."""

    def __init__(self, num_endpoints: int) -> None:
        super().__init__(num_endpoints)
        self._num_outstanding = [0] * num_endpoints

    def pick(self, request: LoadRequest) -> int:
        costs = [self._num_outstanding[endpoint] + self._num_new(request, endpoint) for endpoint in range(self._num_endpoints)]
        chosen = costs.index(min(costs))
        self._num_outstanding[chosen] += _size(request)
        return chosen

    def ended(self, request: LoadRequest, endpoint: int) -> None:
        self._num_outstanding[endpoint] -= _size(request)

    def _num_new(self, request: LoadRequest, endpoint: int) -> int:
        return len(request.token_ids)


class PrefixAware(LeastOutstanding):
    """Picks the endpoint with the fewest tokens under way plus prompt tokens new to it. What it has seen is taken to stay cached."""

    def __init__(self, num_endpoints: int) -> None:
        super().__init__(num_endpoints)
        self._seen: list[set[int]] = [set() for _ in range(num_endpoints)]

    def pick(self, request: LoadRequest) -> int:
        chosen = super().pick(request)
        self._seen[chosen].update(request.block_keys)
        return chosen

    def _num_new(self, request: LoadRequest, endpoint: int) -> int:
        seen = self._seen[endpoint]
        num_known = next((number for number, key in enumerate(request.block_keys) if key not in seen), len(request.block_keys))
        return len(request.token_ids) - num_known * BLOCK_SIZE


BALANCERS: dict[str, type[Balancer]] = {
    "prefix_aware": PrefixAware,
    "least_outstanding": LeastOutstanding,
    "round_robin": Balancer,
}


def make_balancer(name: str, num_endpoints: int) -> Balancer:
    """Raises ConfigError for an unknown name."""
    if name not in BALANCERS:
        raise ConfigError(f"no balancing {name!r}; choose of {', '.join(BALANCERS)}")
    return BALANCERS[name](num_endpoints)


def _size(request: LoadRequest) -> int:
    return len(request.token_ids) + request.num_output_tokens
