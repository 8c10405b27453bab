"""A chat's memory: what was said so far, ready to be sent again. For the sync and the async client alike."""

from __future__ import annotations

from .chat import Message
from .completion import Completion


class Conversation:
    """
    >>> chat = Conversation(system="Answer briefly.")
    >>> completion = client.generate(messages=chat.user("What is a halfmoon?"))
    >>> chat.assistant(completion)
    """

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [Message("system", system)]

    def user(self, text: str) -> list[Message]:
        """Adds the user's turn; returns all messages, to be sent."""
        self.messages.append(Message("user", text))
        return list(self.messages)

    def assistant(self, answer: Completion | str) -> None:
        """Adds the answer, or what came of it before it was left."""
        self.messages.append(Message("assistant", answer if isinstance(answer, str) else answer.text))

    def undo(self) -> None:
        """Takes back the last user's turn and whatever followed it, as if it had not been said."""
        turns = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if turns:
            del self.messages[turns[-1] :]
