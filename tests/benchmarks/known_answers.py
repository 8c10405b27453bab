"""Requests whose right answers are known: given by the cluster before anything hurts it, and held against transformers.

Logits of one prompt differ in their last bits with the batch that they are computed in. So a request is taken only if each of its tokens
is clear: the likeliest logit leads by LEAD, or the number that draws lies DISTANCE from where another token would begin.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import show

from halfmoon.client import AsyncClient
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.kernels.reference.philox import uniform

LEAD, DISTANCE = 1e-3, 1e-5
SHARED_LEN = 1500  # tokens with which the longest prompts begin
PROMPT_LENS = (1, 17, 63, 64, 65, 130, 300, 700, SHARED_LEN + 1, SHARED_LEN + 64, SHARED_LEN + 700)
ANSWER_LENS = (1, 4, 24, 60, 120)


class Case(NamedTuple):
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    seed: int | None  # drawn at temperature 1; None: greedy

    @property
    def sampling(self) -> dict[str, Any]:
        return sampling_of(self.seed)


def sampling_of(seed: int | None) -> dict[str, Any]:
    return {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}


async def known_cases(client: AsyncClient, rng: random.Random, num: int) -> list[Case]:
    """Fewer than num where a token of an answer is not clear. Raises SystemExit for an answer that transformers would not give."""
    shared = [rng.randrange(10, 1000) for _ in range(SHARED_LEN)]

    async def ask(number: int) -> Case:
        length = PROMPT_LENS[number % len(PROMPT_LENS)]
        begin = shared if length > SHARED_LEN else []
        prompt = (*begin, *(rng.randrange(10, 1000) for _ in range(length - len(begin))))
        seed = None if number % 2 else rng.randrange(2**63)
        given = await client.generate(token_ids=prompt, max_tokens=rng.choice(ANSWER_LENS), ignore_eos=True, **sampling_of(seed))
        return Case(prompt, given.token_ids, given.text, seed)

    reference, cases = await asyncio.gather(asyncio.to_thread(Reference), asyncio.gather(*(ask(number) for number in range(num))))
    found = [case for case in cases if await asyncio.to_thread(reference.is_clear, case)]
    show(f"{len(found)} requests with known answers, {sum(len(case.answer) for case in found)} tokens")
    return found


class Reference:
    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self._model: Any = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()

    def is_clear(self, case: Case) -> bool:
        """Raises SystemExit for an answer that is clear and another."""
        prompt, answer, _, seed = case
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer]])
            rows = self._model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        tokens = [greedy(row) if seed is None else drawn(row, seed, index) for index, row in enumerate(rows)]
        for index, (token, given) in enumerate(zip(tokens, answer, strict=True)):
            if token is None:
                return False
            if token != given:
                raise SystemExit(f"without any fault, token {index} of {len(answer)} after {len(prompt)} is {given}; transformers: {token}")
        return True


def greedy(logits: torch.Tensor) -> int | None:
    """logits: [vocab_size]. None where the lead is small."""
    values, tokens = logits.topk(2)
    return int(tokens[0]) if values[0] - values[1] > LEAD else None


def drawn(logits: torch.Tensor, seed: int, index: int) -> int | None:
    """At temperature 1. logits: [vocab_size]. None where the draw is near to another token's."""
    shares = np.cumsum(torch.softmax(logits.double(), dim=-1).numpy())
    draw = float(uniform(np.array([seed], np.uint64), np.array([index], np.uint64))[0])
    token = int(np.searchsorted(shares, draw, side="right"))
    before = shares[token - 1] if token else 0.0
    return token if min(draw - before, shares[token] - draw) > DISTANCE else None
