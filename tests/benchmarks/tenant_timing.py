"""Can one tenant tell by time or by usage what another has asked? A cluster of the demo model on CPU, and two tenants' keys.

python tests/benchmarks/tenant_timing.py --prompts 40 --json timing.json

A asks half of the prompts. Then B asks all of them in random order, and A asks its half again, for comparison. An AUC of 0.5 says that
B's times to the first token tell nothing about which half it was; 1.0 says that they tell it every time.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from halfmoon.client import AsyncClient
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import ray_session
from halfmoon.protocol.config import PORTS, ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig
from halfmoon.proxy.tenants.keys_file import KeysFile

PROMPT_LEN = 1024


@dataclasses.dataclass
class Seen:
    ttft_s: list[float] = dataclasses.field(default_factory=list[float])
    num_cached_tokens: int = 0

    async def ask(self, client: AsyncClient, prompt: list[int]) -> None:
        done = await client.generate(token_ids=prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
        self.ttft_s.append(done.phases.ttft_s)
        self.num_cached_tokens += done.usage.num_cached_tokens

    def summary(self) -> dict[str, float]:
        return {"median_ttft_s": round(statistics.median(self.ttft_s), 4), "num_cached_tokens": self.num_cached_tokens}


def auc(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How often one of `slow` took longer than one of `fast`."""
    return sum((a > b) + 0.5 * (a == b) for a in slow for b in fast) / (len(slow) * len(fast))


async def measure(num_prompts: int, folder: Path) -> dict[str, object]:
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 1000) for _ in range(PROMPT_LEN)] for _ in range(num_prompts)]
    asked, never = prompts[: num_prompts // 2], prompts[num_prompts // 2 :]
    file, a_key = KeysFile({}, {}).with_key("a", {})
    file, b_key = file.with_key("b", {})
    file.save(folder / "keys.json")
    proxy = ProxyConfig(**dict.fromkeys(PORTS, 0), keys_file=str(folder / "keys.json"))  # type: ignore[arg-type]
    config = ClusterConfig(proxy=proxy, prefill=PrefillConfig(num_workers=1), decode=DecodeConfig(num_workers=1))
    with ray_session() as nodes:
        async with running_cluster(config, nodes) as cluster:
            async with AsyncClient(cluster.grpc_address, api_key=a_key) as a, AsyncClient(cluster.grpc_address, api_key=b_key) as b:
                await Seen().ask(b, [5] * PROMPT_LEN)  # warm-up
                first, again, of_asked, of_never = Seen(), Seen(), Seen(), Seen()
                for prompt in asked:
                    await first.ask(a, prompt)
                for prompt in rng.sample(prompts, len(prompts)):
                    await (of_never if prompt in never else of_asked).ask(b, prompt)
                for prompt in asked:
                    await again.ask(a, prompt)
    return {
        "B, prompts that A has asked": of_asked.summary(),
        "B, prompts that nobody has asked": of_never.summary(),
        "B's AUC": round(auc(of_never.ttft_s, of_asked.ttft_s), 3),
        "A, the first time": first.summary(),
        "A, again": again.summary(),
        "A's AUC": round(auc(first.ttft_s, again.ttft_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(arguments.prompts, Path(folder)))
    for name, value in found.items():
        print(f"{name}: {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
