"""One engine alone over the cluster benchmark's prompts: what prefill and a decode step take without a cluster, and the greedy tokens.

python tests/benchmarks/engine_alone.py CASES ROWS      CASES: JSON file, as cluster.py writes it; ROWS: JSON file to write

A process of its own, so that the device's memory is back before the cluster starts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfmoon.engine.engine import Engine
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

NUM_PREFILLS = 5


def chunks_of(sequence: Sequence, max_tokens_per_step: int, block_size: int) -> Iterator[StepChunk]:
    """Of a prompt that a prefill worker has to itself: each fills its step and ends at a block boundary, the last at the prompt's end."""
    start = 0
    while start < sequence.num_tokens:
        end = sequence.num_tokens
        if end - start > max_tokens_per_step:
            end = (start + max_tokens_per_step) // block_size * block_size
        yield StepChunk(sequence, start, end - start)
        start = end


def show(line: str) -> None:
    sys.stdout.write(f"  {line}\n")
    sys.stdout.flush()


def show_stage(stage: str, done: int, total: int) -> None:
    if done == total:
        show(stage)


class Alone:
    """The prompts on an engine of their own, each in its own pages."""

    def __init__(self, cases: dict[str, Any]) -> None:
        self.prompts: list[list[int]] = cases["prompts"]
        self.num_output = cases["num_output"]
        self.max_tokens_per_step = cases["max_tokens_per_step"]
        each = len(self.prompts[0]) + self.num_output
        options = ModelOptions(**cases["options"])
        self._num_pages = -(-each // options.block_size)
        num_tokens = len(self.prompts) * self._num_pages * options.block_size
        self.engine = Engine.load(
            options, kv_capacity_tokens=num_tokens, num_threads=1, max_decode_batch=cases["max_running"], progress=show_stage
        )

    def sequence(self, number: int) -> Sequence:
        """With pages of its own for prompt and answer."""
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=self.num_output)
        tokens = list(self.prompts[number])
        pages = list(range(number * self._num_pages, (number + 1) * self._num_pages))
        return Sequence(f"r{number}", tokens, len(tokens), params, pages=pages)

    def prefill(self, sequence: Sequence) -> float:
        """Seconds until the first token is on the host. It is appended."""
        began = time.perf_counter()
        *others, last = chunks_of(sequence, self.max_tokens_per_step, self.engine.page_size)
        for chunk in others:
            self.engine.forward([chunk])
        (first,) = self.engine.sample(self.engine.forward([last]), [sequence])
        taken = time.perf_counter() - began
        sequence.token_ids.append(first.token_id)
        return taken

    def step(self, batch: list[Sequence]) -> tuple[float, float]:
        """Seconds until the next tokens are on the host, and by how much the likeliest logit of the first row leads. They are appended."""
        began = time.perf_counter()
        logits = self.engine.forward([StepChunk(one, one.num_tokens - 1, 1) for one in batch])
        sampled = self.engine.sample(logits, batch)
        taken = time.perf_counter() - began
        best, second = logits[0].topk(2).values.tolist()
        for sequence, sample in zip(batch, sampled, strict=True):
            sequence.token_ids.append(sample.token_id)
        return taken, best - second

    def decode(self, numbers: range) -> tuple[list[Sequence], float, list[float]]:
        """Every prompt prefilled, then all of them decoded together: the mean seconds of a step, and the leads."""
        batch = [self.sequence(number) for number in numbers]
        for sequence in batch:
            self.prefill(sequence)
        steps = [self.step(batch) for _ in range(self.num_output - 1)]
        return batch, statistics.fmean(seconds for seconds, _ in steps), [lead for _, lead in steps]


def measure(cases: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    alone = Alone(cases)
    loaded_s = time.perf_counter() - began
    show(f"loaded, {loaded_s:.1f} s")
    alone.decode(range(1))  # warm
    prefills = [alone.prefill(alone.sequence(0)) for _ in range(NUM_PREFILLS)]
    tokens, leads, singles = [], [], []
    for number in range(cases["num_compared"]):
        (sequence,), step_s, found = alone.decode(range(number, number + 1))
        tokens.append(sequence.token_ids[sequence.num_prompt_tokens :])
        leads.append(found)
        singles.append(step_s)
        show(f"prompt {number} decoded")
    steps = {1: statistics.median(singles)}
    for num_seqs in range(2, len(alone.prompts) + 1):
        steps[num_seqs] = alone.decode(range(num_seqs))[1]
    return {
        "load_s": loaded_s,
        "prefill_s": statistics.median(prefills),
        "prefill_all_s": prefills,
        "step_s": steps,  # batch -> mean over the answer
        "tokens": tokens,
        "leads": leads,  # [prompt][i]: of the token at output index i + 1
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
