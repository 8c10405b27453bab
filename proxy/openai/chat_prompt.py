"""A body whose prompt is a chat. The messages are read once: here, or in another process that hands them over."""

from __future__ import annotations

from pydantic import BaseModel, PrivateAttr

from ..text.chat_template import ChatMessage


class ChatPrompt(BaseModel):
    _chat: list[ChatMessage] | None = PrivateAttr(None)

    @property
    def chat(self) -> list[ChatMessage]:
        """The messages in GenerateRequest's form. Raises InvalidRequest."""
        if self._chat is None:
            self._chat = self._read_chat()
        return self._chat

    @chat.setter
    def chat(self, messages: list[ChatMessage]) -> None:
        """Set instead of the body's own messages if another process has parsed it."""
        self._chat = messages

    def _read_chat(self) -> list[ChatMessage]:
        raise NotImplementedError
