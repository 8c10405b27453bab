"""A prompt's log probabilities in a reply: OpenAI's form where the prompt is echoed, vLLM's prompt_logprobs.

A prompt may have thousands of tokens, so neither is ever one value that would be encoded in one go:
whole    PromptText.parts ─► JSON of each part ─► joined ─► put in the place of null in the reply's JSON
stream   PromptText.parts ─► a chunk of each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..requests.prompt_text import PromptText, PromptToken
from .encoded import items, listed, spliced

LEAST_LOGPROB = -9999.0  # a masked token has -inf, which JSON lacks; OpenAI sends this instead
LEGACY = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(frozen=True, slots=True)
class PromptForms:
    """What a request asked for. Neither: its prompts are not scored."""

    echoed: int | None = None  # the likeliest of each token in the legacy logprobs, before those of the answer; None: not there
    listed: int | None = None  # of each token in prompt_logprobs; None: not there

    @property
    def any(self) -> bool:
        return self.echoed is not None or self.listed is not None


UNSCORED = PromptForms()


def legacy_part(tokens: Sequence[PromptToken], num_top: int, text_len: int) -> dict[str, list[Any]]:
    """The four columns of OpenAI's legacy logprobs. text_len: of the echoed text, within which all offsets are."""
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        top: dict[str, float] = {}
        for likely in token.top[:num_top]:
            top.setdefault(likely.text, max(likely.logprob, LEAST_LOGPROB))  # several tokens may look alike; the likeliest one stays
        if token.logprob is not None:
            top.setdefault(token.text, max(token.logprob, LEAST_LOGPROB))
        tops.append(top if token.logprob is not None else None)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [None if token.logprob is None else max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": tops,
        "text_offset": [min(token.text_offset, text_len) for token in tokens],
    }


def listed_part(tokens: Sequence[PromptToken], num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token the likeliest and itself, by their ids; null for the first."""
    found: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            found.append(None)
            continue
        entries = {token.token_id: _entry(token.logprob, token.rank, token.text)}
        for rank, likely in enumerate(token.top[:num_top], start=1):
            entries.setdefault(likely.token_id, _entry(likely.logprob, rank, likely.text))
        found.append({str(token_id): entry for token_id, entry in entries.items()})
    return found


def _entry(logprob: float, rank: int, text: str) -> dict[str, Any]:
    return {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank, "decoded_token": text}


async def prompt_json(
    text: PromptText, forms: PromptForms, text_len: int, answer: Mapping[str, list[Any]] | None
) -> dict[str, list[bytes]]:
    """By field, the JSON that takes the place of null: logprobs, prompt_logprobs, as asked for. answer: its legacy columns."""
    columns: dict[str, list[bytes]] = {name: [] for name in LEGACY}
    entries: list[bytes] = []
    async for part in text.parts():
        if forms.echoed is not None:
            for name, values in legacy_part(part, forms.echoed, text_len).items():
                columns[name].append(items(values))
        if forms.listed is not None:
            entries.append(items(listed_part(part, forms.listed)))
    found: dict[str, list[bytes]] = {}
    if forms.echoed is not None:
        for name, values in (answer or {}).items():
            columns[name].append(items(values))
        found["logprobs"] = spliced(dict.fromkeys(LEGACY), {name: listed(parts) for name, parts in columns.items()})
    if forms.listed is not None:
        found["prompt_logprobs"] = listed(entries)
    return found
