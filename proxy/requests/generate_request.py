"""What a user asked for, in one form for every face, and its way to checked requests.

GenerateRequest ─► prompts to token ids ─► limits ─► SamplingParams ─► a ProxyRequest for each choice
 (prompt text, token ids or messages; n)                    choice p*n+i: prompt p, seed+i
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...client.options import MAX_TIMEOUT_S
from ...protocol.errors import InvalidRequest, PromptTooLong, UnknownModel, shown
from ...protocol.sampling import MAX_LOGPROBS, MAX_SEED, SamplingParams
from ...protocol.trace_context import TraceContext
from ..model_card import ModelCard
from ..request import MAX_CHOICES, MAX_N, ProxyRequest
from ..tenants.tenant import Tenant
from ..text.answer_form import AnswerForm, AnswerForms
from ..text.chat_template import PLAIN, ChatMessage, ChatOptions, num_chars
from ..text.tokenizer import Tokenizer, require_unicode
from ..text.tools import ToolUse
from .choice_text import AS_TEXT, TextOptions

MAX_STOPS = 16
MAX_BAD_WORDS = 128
MAX_SALT_CHARS = 1024
MAX_PROMPT_LOGPROBS = 2**20  # in a reply, those of the likeliest tokens among them; about 40 MB of JSON
MAX_RETURNED = 2**15  # token ids of prompts in a reply, which is written in one go
LEAST_BIAS = -100.0  # of a token that is not to come, as in OpenAI's logit_bias
PIECE_LEN = 2**14  # tokens that are checked in one go, in about 2 ms
MAX_STOP_CHARS = 1024  # of each, because every token's text is compared with them
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for a prompt; a chat may use what is left
LABEL_LEN = 128
CHARS_COMPOSED = 4  # at most so many characters become one in a tokenizer's Unicode normal form


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """The types are right; the values are as they came, not yet checked. Exactly one of prompts and messages is set."""

    prompts: Sequence[str | Sequence[int]] = ()
    messages: Sequence[ChatMessage] | None = None
    chat: ChatOptions = PLAIN  # how messages are rendered
    add_special_tokens: bool = True  # BOS and the like, around prompts that are texts
    truncate_prompt_tokens: int | None = None  # of a longer prompt the last so many are taken; -1: as many as the model takes
    model: str = ""  # empty: the served one
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # ours: nobody can guess it, so that who knows it may cancel
    label: str = ""  # the client's own name for it; nothing goes by it but explain
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    prompt_only: bool = False  # max_tokens is 1, for workers draw a token after every prompt, and the answer is empty
    stop: Sequence[str] = ()
    bad_words: Sequence[str] = ()  # words of one token, with or without a blank before it, that the answer has not
    text: TextOptions = AS_TEXT
    tools: ToolUse | None = None  # None: the face gives answers as they are, and reads no calls and no reasoning from them
    cache_salt: str = ""  # prefixes are shared with requests of the same tenant and salt alone
    timeout_s: float | None = None
    priority: int = 0
    ttft_slo_s: float | None = None  # None: the proxy's
    tpot_slo_s: float | None = None
    return_token_ids: bool = False  # the prompts' are wanted back
    trace: TraceContext | None = None
    tenant: Tenant | None = None  # None: keys are not asked for
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])  # SamplingParams' other fields
    arrival: float = field(default_factory=time.monotonic)  # of its first byte, if the face can know it


class RequestBuilder:
    def __init__(self, tokenizer: Tokenizer, card: ModelCard, default_timeout_s: float, forms: AnswerForms | None = None) -> None:
        """forms: None: answers are plain text."""
        self._tokenizer = tokenizer
        self._forms = forms or AnswerForms(tokenizer)
        self._card = card
        self._default_timeout_s = min(default_timeout_s, MAX_TIMEOUT_S)

    async def build(self, asked: GenerateRequest, max_model_len: int) -> list[ProxyRequest]:
        """One request for each choice, the first prompt's choices first. Choices of one prompt share the same token_ids object.

        Raises InvalidRequest (PromptTooLong, UnknownModel, PermissionDenied), naming the field, the value and the limit.
        """
        timeout_s = self._default_timeout_s if asked.timeout_s is None else asked.timeout_s
        self._require_sound(asked, timeout_s)
        prompts: list[Sequence[int]] = [
            self._truncated(asked, token_ids, max_model_len) for token_ids in await self._token_ids(asked, max_model_len)
        ]
        param = "prompt" if asked.messages is None else "messages"
        num_returned = sum(map(len, prompts)) if asked.return_token_ids else 0
        _require(
            num_returned <= MAX_RETURNED,
            f"the prompts have {num_returned} tokens, and return_token_ids gives back at most {MAX_RETURNED}; leave it out",
            "return_token_ids",
        )
        num_top = asked.sampling.get("num_prompt_logprobs")
        num_logprobs = 0 if num_top is None else asked.n * sum(map(len, prompts)) * (1 + min(num_top, MAX_LOGPROBS))
        _require(
            num_logprobs <= MAX_PROMPT_LOGPROBS,
            f"prompts and n give {num_logprobs} log probabilities of prompt tokens, and a reply has at most {MAX_PROMPT_LOGPROBS}; send "
            "fewer prompts in a request, or ask for fewer of the likeliest tokens",
            "num_prompt_logprobs",
        )
        for token_ids in prompts:
            self._require_fits(token_ids, param, max_model_len)
            await self._require_all_known(token_ids, param)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        _require(0 <= seed <= MAX_SEED, f"seed is {seed}; it must be at least 0 and at most {MAX_SEED}", "seed")
        request_id = asked.request_id
        salt = salted(b"" if asked.tenant is None else asked.tenant.salt, asked.cache_salt)
        params = [self._params(asked, token_ids, max_model_len, seed) for token_ids in prompts]
        return [
            ProxyRequest(
                request_id=request_id if len(prompts) * asked.n == 1 else f"{request_id}-{prompt * asked.n + choice}",
                label=asked.label,
                token_ids=token_ids,
                sampling=dataclasses.replace(params[prompt], seed=(seed + choice) & MAX_SEED),
                timeout_s=timeout_s,
                priority=asked.priority,
                arrival=asked.arrival,
                ttft_slo_s=asked.ttft_slo_s,
                tpot_slo_s=asked.tpot_slo_s,
                trace=asked.trace,
                operation="text_completion" if asked.messages is None else "chat",
                salt=salt,
            )
            for prompt, token_ids in enumerate(prompts)
            for choice in range(asked.n)
        ]

    async def tokenize(self, asked: GenerateRequest, max_model_len: int) -> Sequence[int]:
        """The tokens of its one prompt, however many. Raises InvalidRequest (UnknownModel, PromptTooLong for far too long a text)."""
        self._require_model(asked.model)
        (token_ids,) = await self._token_ids(asked, max_model_len)
        return token_ids

    async def require_tokens(self, model: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest for another model, or a token that the model does not have."""
        self._require_model(model)
        await self._require_all_known(token_ids, "tokens")

    async def _require_all_known(self, token_ids: Sequence[int], param: str) -> None:
        for start in range(0, len(token_ids), PIECE_LEN):
            self._require_known(token_ids[start : start + PIECE_LEN], param)
            if start:
                await asyncio.sleep(0)  # a million tokens take 100 ms

    def _require_model(self, model: str) -> None:
        _require(model in ("", self._card.name), no_such_model(model, self._card.name), "model", UnknownModel)

    def form(self, asked: GenerateRequest, token_ids: Sequence[int]) -> AnswerForm | None:
        """How the answers to this prompt are read. None: they are plain text. Raises InvalidRequest."""
        if asked.tools is None:
            return None
        continued = asked.messages[-1].content if asked.messages and asked.chat.continue_final_message else None
        return self._forms.of(asked.tools, token_ids, continued)

    def _require_sound(self, asked: GenerateRequest, timeout_s: float) -> None:
        """All but the prompts and what is sampled."""
        self._require_model(asked.model)
        _require(1 <= asked.n <= MAX_N, f"n is {asked.n}; it must be at least 1 and at most {MAX_N}", "n")
        num_choices = asked.n * len(asked.prompts)
        _require(
            num_choices <= MAX_CHOICES,
            f"{len(asked.prompts)} prompts with n {asked.n} are {num_choices} choices; a request may have {MAX_CHOICES}",
            "prompt",
        )
        _require(len(asked.label) <= LABEL_LEN and asked.label.isprintable(), _BAD_LABEL, "request_id")
        _require(len(asked.stop) <= MAX_STOPS, f"stop has {len(asked.stop)} strings; it may have {MAX_STOPS}", "stop")
        longest = max(map(len, asked.stop), default=0)
        _require(longest <= MAX_STOP_CHARS, f"stop has a string of {longest} characters; each may have {MAX_STOP_CHARS}", "stop")
        _require(all(asked.stop), "stop has an empty string, which would end every answer at once; leave it out", "stop")
        kept = asked.truncate_prompt_tokens
        _require(
            kept is None or kept == -1 or kept >= 1,
            f"truncate_prompt_tokens is {kept}; it must be at least 1, or -1 for as many as the model takes",
            "truncate_prompt_tokens",
        )
        _require(len(asked.bad_words) <= MAX_BAD_WORDS, f"bad_words has {len(asked.bad_words)}; it may have {MAX_BAD_WORDS}", "bad_words")
        _require(
            len(asked.cache_salt) <= MAX_SALT_CHARS,
            f"cache_salt has {len(asked.cache_salt)} characters; it may have {MAX_SALT_CHARS}",
            "cache_salt",
        )
        require_unicode(asked.cache_salt, "cache_salt")
        _require(-(2**31) <= asked.priority < 2**31, f"priority is {asked.priority}; it must fit 32 bits", "priority")
        if asked.tenant is not None:
            asked.tenant.require_priority(asked.priority)
        _require(
            0 < timeout_s <= MAX_TIMEOUT_S,  # NaN is neither
            f"timeout is {timeout_s}; it must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f} (7 days)",
            "timeout_s",
        )
        for name in ("ttft_slo_s", "tpot_slo_s"):
            slo_s = getattr(asked, name)
            _require(
                slo_s is None or 0 < slo_s <= MAX_TIMEOUT_S,
                f"{name} is {slo_s}; it must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f} (7 days)",
                name,
            )

    async def _token_ids(self, asked: GenerateRequest, max_model_len: int) -> list[Sequence[int]]:
        if asked.messages is not None:
            _require(bool(asked.messages), "messages is empty; send at least one", "messages")
            num_text_chars = sum(message.num_chars for message in asked.messages) + num_chars(asked.chat.tools)
            self._require_text_fits(num_text_chars, "messages", max_model_len)
            return [await self._tokenizer.encode_chat_aside(asked.messages, asked.chat)]
        _require(bool(asked.prompts), "there is no prompt; send one", "prompt")
        texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
        for text in texts:
            self._require_text_fits(len(text), "prompt", max_model_len)
            require_unicode(text, "prompt")
        encoded = iter(await self._tokenizer.encode_all_aside(texts, add_special_tokens=asked.add_special_tokens))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in asked.prompts]

    def _require_text_fits(self, num_chars: int, param: str, max_model_len: int) -> None:
        """Checked before the text is tokenised, which takes seconds for megabytes.

        No text that fits is longer than the limit, unless the tokenizer drops parts of it, as some do with long runs of blanks.
        """
        limit = max_model_len * self._tokenizer.max_token_chars * CHARS_COMPOSED
        if num_chars > limit:
            raise PromptTooLong(
                f"This model's maximum context length is {max_model_len} tokens for prompt and answer together, and a text of at most "
                f"{limit} characters; the prompt has {num_chars} characters, so shorten it",
                param=param,
                num_prompt_chars=num_chars,
                max_model_len=max_model_len,
            )

    def _require_fits(self, token_ids: Sequence[int], param: str, max_model_len: int) -> None:
        _require(bool(token_ids), "the prompt is empty; it must have at least one token", param)
        if len(token_ids) >= max_model_len:
            raise PromptTooLong(
                f"This model's maximum context length is {max_model_len} tokens for prompt and answer together; the prompt has "
                f"{len(token_ids)} tokens and may have {max_model_len - 1}",
                param=param,
                num_prompt_tokens=len(token_ids),
                max_model_len=max_model_len,
            )

    def _require_known(self, token_ids: Collection[int], param: str) -> None:
        size = self._card.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise InvalidRequest(f"{param} has token id {wrong}; this model's are at least 0 and at most {size - 1}", param=param)

    def _params(self, asked: GenerateRequest, token_ids: Sequence[int], max_model_len: int, seed: int) -> SamplingParams:
        num_prompt_tokens = len(token_ids)
        left = max_model_len - num_prompt_tokens
        max_tokens = asked.max_tokens
        if max_tokens is None:
            max_tokens = left if asked.messages is not None else min(left, COMPLETION_MAX_TOKENS)
        elif max_tokens > left:
            raise PromptTooLong(
                f"This model's maximum context length is {max_model_len} tokens for prompt and answer together; the prompt has "
                f"{num_prompt_tokens} tokens and max_tokens is {max_tokens}, so max_tokens may be {left}",
                param="max_tokens",
                num_prompt_tokens=num_prompt_tokens,
                max_model_len=max_model_len,
            )
        sampling = {**self._card.sampling, **asked.sampling}
        self._require_known(sampling.get("logit_bias", {}), "logit_bias")
        self._require_known(sampling.get("stop_token_ids", ()), "stop_token_ids")
        sampling["stop_token_ids"] = self._stop_token_ids(asked)
        if (form := self.form(asked, token_ids)) is not None:
            sampling["grammar"] = form.grammar(sampling.get("grammar"))
        if asked.bad_words:
            sampling["logit_bias"] = {**sampling.get("logit_bias", {}), **dict.fromkeys(self._banned(asked.bad_words), LEAST_BIAS)}
        return SamplingParams(**sampling, seed=seed, max_tokens=max_tokens)

    def _truncated(self, asked: GenerateRequest, token_ids: Sequence[int], max_model_len: int) -> Sequence[int]:
        kept = asked.truncate_prompt_tokens
        if kept is None:
            return token_ids
        return token_ids[-(max_model_len - (asked.max_tokens or 1) if kept == -1 else kept) :]

    def _banned(self, bad_words: Sequence[str]) -> set[int]:
        """Raises InvalidRequest for a word of several tokens: sampling sees one token at a time."""
        banned: set[int] = set()
        for word in bad_words:
            spelled = [self._tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word.lstrip()}")]
            tokens = {token_ids[0] for token_ids in spelled if len(token_ids) == 1}
            _require(bool(tokens), f"bad_words has {shown(word)}, which is no single token of this model; leave it out", "bad_words")
            banned |= tokens
        return banned

    def _stop_token_ids(self, asked: GenerateRequest) -> tuple[int, ...]:
        """The request's own; stop strings that are special tokens, which leave no text; and EOS tokens that workers don't know of."""
        found: dict[int, None] = dict.fromkeys(asked.sampling.get("stop_token_ids", ()))
        for stop in asked.stop:
            token_id = self._tokenizer.special_token_id(stop)
            if token_id is not None and token_id < self._card.vocab_size:
                found[token_id] = None
        if not asked.sampling.get("ignore_eos"):
            found.update(dict.fromkeys(self._card.other_eos_token_ids))
        return tuple(found)


_BAD_LABEL = f"the request id must be printable and at most {LABEL_LEN} characters long"


def no_such_model(asked: str, served: str) -> str:
    """In words that clients look for."""
    return f"The model {shown(asked)} does not exist; {served!r} is served"


def salted(salt: bytes, cache_salt: str) -> bytes:
    """The tenant's salt with the request's own: neither tenants nor salts share a prefix."""
    if not cache_salt:
        return salt
    return hashlib.blake2b(cache_salt.encode(), digest_size=32, key=salt[: hashlib.blake2b.MAX_KEY_SIZE], person=b"cache_salt").digest()


def _require(holds: bool, message: str, param: str, error: type[InvalidRequest] = InvalidRequest) -> None:
    if not holds:
        raise error(message, param=param)
