"""Streamed requests against a cluster, from one of its hosts. Prints one JSON line: what came of them.

    load.py ADDRESS --requests N              until N have ended
    load.py ADDRESS --until FILE              a few at a time with pauses, until FILE is there

Every prompt is asked again and again; the greedy answer has to be the same token for token.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import sys
from pathlib import Path

from halfmoon.client import AsyncClient
from halfmoon.protocol.errors import HalfmoonError

CONCURRENCY, BESIDE_OTHERS = 6, 2
PAUSE_S = 0.3  # the hosts share one machine, on which the rest of the lab has to go on
NUM_TOKENS = 24
NUM_PROMPTS = 12


def prompt(number: int) -> list[int]:
    """Token ids of the demo model: 60 to 280 of them, so that most prompts have full blocks."""
    length = 60 + 20 * number
    return [10 + (number * 37 + position * 11) % 900 for position in range(length)]


class Load:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._answers: dict[int, list[int]] = {}
        self.num_streams = self.num_replayed = self.num_different = 0
        self.failures: list[str] = []
        self.decoded_by: collections.Counter[str] = collections.Counter()
        self.transports: collections.Counter[str] = collections.Counter()

    async def ask(self, number: int) -> None:
        try:
            stream = self._client.stream(token_ids=prompt(number), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            async for _ in stream:
                pass
            completion = await stream.completion()
        except HalfmoonError as error:
            self.failures.append(f"{error.code}: {error.message}")
            return
        self.num_streams += 1
        self.num_replayed += completion.phases.num_attempts > 1
        self.num_different += list(completion.token_ids) != self._answers.setdefault(number, list(completion.token_ids))
        self.decoded_by[completion.phases.decode_worker] += 1
        self.transports[completion.phases.transport] += 1


async def main(address: str, num_requests: int, until: Path | None) -> dict[str, object]:
    async with AsyncClient(address) as client:
        load, numbers = Load(client), iter(range(num_requests if until is None else sys.maxsize))

        async def client_of_its_own() -> None:
            for number in numbers:
                if until is not None and until.exists():
                    return
                await load.ask(number % NUM_PROMPTS)
                if until is not None:
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(client_of_its_own() for _ in range(CONCURRENCY if until is None else BESIDE_OTHERS)))
    return {
        "streams": load.num_streams,
        "failed": len(load.failures),
        "replayed": load.num_replayed,
        "different": load.num_different,
        "decoded_by": dict(sorted(load.decoded_by.items())),
        "transports": dict(sorted(load.transports.items())),
        "failures": load.failures[:5],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--until", type=Path)
    asked = parser.parse_args()
    print(json.dumps(asyncio.run(main(asked.address, asked.requests, asked.until))))
