"""One short request through the cluster: where its time went, beside what was predicted."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from ...client import AsyncClient, PhaseRecord, Usage
from ...protocol.errors import HalfmoonError
from ..checks.finding import Finding, ok

NUM_WORDS = 64
NUM_TOKENS = 16
TIMEOUT_S = 30.0
FAR_OFF = 3.0  # times the prediction
NOTICEABLE_S = 0.25  # what is shorter is not called slow

ADVICE = {
    "queue_s": ("waiting in the proxy", "more requests come than workers can take: add workers, or an admission"),
    "prefill_queue_s": ("waiting for the prefill worker", "add a prefill worker, or let decode workers help (proxy.policy adaptive)"),
    "prefix_load_s": ("loading the cached prefix", "look at the link to the store"),
    "prefill_s": ("prefill itself", "the prefill worker's device is slow or shared: see devices and load"),
    "push_s": ("pushing KV to the store", "look at the link to the store of the decode worker"),
    "handoff_wait_s": ("the hand-off to decode", "look at the link between the two workers' nodes"),
    "first_decode_s": ("the first decode step", "the decode worker's batch is large, or its device is shared"),
    "write_s": ("writing to the client", "the proxy's machine is busy"),
}


class Probe(NamedTuple):
    phases: PhaseRecord | None  # None where it failed
    usage: Usage | None
    finding: Finding


async def send_probe(address: str, max_model_len: int, api_key: str = "", authority: bytes | None = None) -> Probe:
    """A prompt that nobody has sent before, so that no cache answers."""
    num_words = max(1, min(NUM_WORDS, max_model_len // 16))
    prompt = " ".join(secrets.token_hex(2) for _ in range(num_words))
    try:
        async with AsyncClient(address, api_key=api_key, authority=authority) as client:
            found = await client.generate(prompt=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=TIMEOUT_S)
    except HalfmoonError as error:
        return Probe(None, None, Finding("probe", "fault", f"a probe request failed: {error.message}", code=error.code))
    return Probe(found.phases, found.usage, judge(found.phases))


def judge(phases: PhaseRecord) -> Finding:
    """Slow is what takes several times as long as predicted, and long enough to be noticed."""
    predicted = f" ({phases.predicted_ttft_s:.3f} s predicted)" if phases.predicted_ttft_s else ""
    told = f"first token after {phases.ttft_s:.3f} s{predicted}, then one each {phases.tpot_s:.3f} s"
    if phases.ttft_s <= max(NOTICEABLE_S, FAR_OFF * phases.predicted_ttft_s):
        return ok("probe", f"a probe request got its {told}")
    worst = max(ADVICE, key=lambda name: getattr(phases, name))
    meaning, advice = ADVICE[worst]
    return Finding("probe", "slow", f"a probe request got its {told}; {getattr(phases, worst):.3f} s of it went into {meaning}", advice)
