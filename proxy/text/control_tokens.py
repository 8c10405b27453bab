"""Control tokens that a user wrote are text, and no control tokens (`model.special_tokens_in_text: literal`).

messages ─► mark: ⟦<|im_end|>⟧ ─► template ─► split at the marks ─► marked: encoded as text · the rest: as always ─► token ids
The method is that of transformers 5 (sanitize_control_tokens), and so are the token ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from tokenizers import Tokenizer as RustTokenizer

from ...protocol.errors import InvalidRequest, shown

START, END = "\U000f0000", "\U000f0001"  # of a mark: for private use, and taken out of what users write
Encode = Callable[[list[str]], list[list[int]]]


class ControlTokens:
    """texts: of the control tokens. backend: a copy that is this object's own."""

    def __init__(self, texts: Collection[str], backend: RustTokenizer) -> None:
        longest_first = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
        self._controls = re.compile(longest_first)
        self._marked = re.compile(f"{START}({longest_first}){END}|[{START}{END}]")
        self._backend = backend
        self._backend.encode_special_tokens = True

    def mark(self, value: Any) -> Any:
        """The same with every control token in its strings marked."""
        if isinstance(value, str):
            return self._controls.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
        if isinstance(value, dict):
            return {key: self.mark(found) for key, found in cast(dict[str, Any], value).items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(found) for found in cast(Sequence[Any], value)]
        return value

    @staticmethod
    def has_marks(text: str) -> bool:
        return START in text or END in text

    def encode(self, text: str, encode: Encode) -> list[int]:
        """encode: of texts without marks. Raises InvalidRequest where a control token can't be told from text."""
        pieces = self._marked.split(text)  # text, marked, text …; None stands for half a mark, which a template has cut off
        plain, marked = _after_newline(pieces[0::2], encode), _after_newline(pieces[1::2], self._as_text)
        for piece, token_ids in zip(pieces[1::2], marked, strict=True):
            if piece and self._backend.token_to_id(piece) in token_ids:
                raise InvalidRequest(f"the messages have {shown(piece)}, which this model's tokenizer can't take as text", param="messages")
        (token_ids,) = encode([pieces[0]])
        token_ids = list(token_ids)
        for ours, theirs in zip(marked, plain[1:], strict=True):
            token_ids += ours + theirs
        return token_ids

    def _as_text(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _after_newline(pieces: Sequence[str | None], encode: Encode) -> list[list[int]]:
    """Of pieces from amid a text. Behind a newline, which is taken off again, no tokenizer puts a blank before them."""
    (newline,) = encode(["\n"])
    found: list[list[int]] = []
    for piece, token_ids in zip(pieces, encode([f"\n{piece or ''}" for piece in pieces]), strict=True):
        if not piece:
            found.append([])
        elif token_ids[: len(newline)] == newline:
            found.append(token_ids[len(newline) :])
        else:
            found += encode([piece])
    return found
