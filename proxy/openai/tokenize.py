"""/tokenize and /detokenize in vLLM's form: the tokens of a prompt or a chat as a request would have them, and their text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...protocol.errors import InvalidRequest
from ..requests.generate_request import GenerateRequest
from ..text.chat_template import ChatMessage, ChatOptions
from ..text.tokenizer import Tokenizer
from .chat_prompt import ChatPrompt
from .encoded import items, listed, spliced
from .tool_bodies import ToolBody, tool_use
from .types import Checked, MessageBody

PART_TOKENS = 2**10  # whose texts and JSON are made in one go, in a few milliseconds


class TokenizeBody(ChatPrompt):
    """Of a text or of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Checked[MessageBody] | None = None
    add_special_tokens: bool | None = None
    """Of a text; true by default. A chat's template writes its own."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Checked[ToolBody] | None = None
    """That the model is told of."""
    return_token_strs: bool | None = None

    def _read_chat(self) -> list[ChatMessage]:
        return [message.to_message(position) for position, message in enumerate(self.messages or ())]

    def to_generate_request(self) -> GenerateRequest:
        """What has the same tokens. Raises InvalidRequest."""
        chat, model = self.chat, self.model or ""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either a prompt or messages", param="prompt")
        if self.prompt is not None:
            return GenerateRequest(model=model, prompts=[self.prompt], add_special_tokens=self.add_special_tokens is not False)
        options = ChatOptions.asked(
            self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            tools=tool_use(self.tools, None, None).definitions,
        )
        return GenerateRequest(model=model, messages=chat, chat=options)


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Checked[int]


async def tokenized_json(tokenizer: Tokenizer, token_ids: Sequence[int], max_model_len: int, *, with_texts: bool) -> list[bytes]:
    """The reply of /tokenize, in parts. with_texts: of each token by itself."""
    tokens: list[bytes] = []
    texts: list[bytes] = []
    for start in range(0, len(token_ids), PART_TOKENS):
        part = token_ids[start : start + PART_TOKENS]
        tokens.append(items(list(part)))
        if with_texts:
            texts.append(items([tokenizer.token_text(token_id) for token_id in part]))
        await asyncio.sleep(0)
    fields = {"tokens": listed(tokens)} | ({"token_strs": listed(texts)} if with_texts else {})
    return spliced({"count": len(token_ids), "max_model_len": max_model_len, "tokens": None, "token_strs": None}, fields)
