"""Token ids to text, as they come: whole characters only, stop strings held back and cut.

byte-level    token ─► its bytes, from a table ─► incremental UTF-8 ─┐
any other     tokens ─► window decode ─► whole characters ───────────┴─► StopStrings ─► text that can no longer change
                         │ holds a character's first bytes                │ holds what may be the beginning of a stop string

`tokenizers.decoders.DecodeStream` is not used: it has no flush for the tail, and it raises on bytes that never
become UTF-8. The window is that of text-generation-inference and vLLM: decode from a safe boundary twice, with and
without the new tokens, and the difference is the new text whatever the decoder does at the start of a text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # of the prompt, for decoders that treat a text's first token differently
_UNFINISHED = "\ufffd"  # what the bytes of an unfinished character decode to
_PATIENCE = 4  # tokens: as many as a character has bytes at most; a longer run of unfinished ones is no character
_PENDING_TOKENS = 3  # whatever has begun and not ended lies in as many: a character but for its last byte has 3 bytes


class Detokenizer(Protocol):
    """Invariant: all text returned so far + finish() == decode(all tokens), for tokenizers that decode byte by byte."""

    def push(self, token_id: int) -> str:
        """The characters that the token completes; "" while one is under way."""
        ...

    def finish(self) -> str:
        """What is still held: the replacement character of bytes that nothing completed, or ""."""
        ...


def create_detokenizer(tokenizer: Tokenizer, context: Sequence[int] = ()) -> Detokenizer:
    """context: the prompt's token ids; a word that continues it keeps its leading space."""
    return ByteDetokenizer(tokenizer) if tokenizer.is_byte_level else WindowDetokenizer(tokenizer, context)


class ByteDetokenizer:
    """Of a decoder that only strings bytes together. A prompt changes nothing: one that breaks off inside a character leaves the
    answer to stand by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.decoded_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Of any decoder. A token costs two decodes of a few tokens, however many came before."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._token_ids = list(context[-_CONTEXT_TOKENS:])
        if tokenizer.decode(self._token_ids).endswith(_UNFINISHED):
            self._token_ids = []  # the prompt breaks off inside a character: what follows stands by itself
        self._read = len(self._token_ids)  # tokens before it are returned; the window starts at 0
        self._known = tokenizer.decode(self._token_ids)

    def push(self, token_id: int) -> str:
        if self._tokenizer.is_silent(token_id):
            return ""
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        impatient = len(self._token_ids) - self._read > _PATIENCE
        whole = not text.endswith(_UNFINISHED) or (impatient and self._tokenizer.byte_fallback)
        stable = text if whole else self._stable_part(text)
        new = stable[len(self._known) :]
        if whole and new:
            self._token_ids = self._token_ids[self._read :]
            self._read = len(self._token_ids)
            self._known = self._tokenizer.decode(self._token_ids)
        elif new:
            self._known = stable
        if impatient and not whole:
            self._slide()
        return new

    def _slide(self) -> None:
        """Shortens a window that ends in bytes which are no character yet, all of it returned but its last replacement character.

        It may now begin inside a character: what that decodes to stands in `known`, and is not returned. UTF-8 is in step
        again at the next byte that begins a character, and the one that is under way begins among _PENDING_TOKENS.
        """
        self._token_ids = self._token_ids[-_PENDING_TOKENS:]
        self._read = 0
        self._known = self._tokenizer.decode(self._token_ids).removesuffix(_UNFINISHED)

    def _stable_part(self, text: str) -> str:
        """Of a text whose last character is unfinished: the rest of it, where nothing to come can change it."""
        # a byte-fallback decoder shows one replacement character per byte, and all of them turn into one character
        return self._known if self._tokenizer.byte_fallback else text.removesuffix(_UNFINISHED)

    def finish(self) -> str:
        text = self._tokenizer.decode(self._token_ids)
        new, self._known = text[len(self._known) :], text
        return new


class StopStrings:
    """Finds the stop string that is complete first (of two that end together, the longer), however the text is cut.

    Text is returned as soon as no stop string can begin in it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._num_exempt = 0  # characters of held in which no stop string may end
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may go out: up to the stop string once one is `matched`, nothing after it."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            out, self._held = self._held[:start], ""
            return out
        out, self._held = self._split(self._held)
        self._num_exempt = max(self._num_exempt - len(out), 0)
        return out

    def push_exempt(self, text: str) -> str:
        """As push, of text in which no stop string counts. One that begins in it may still end behind it."""
        if not self._stops:
            return text
        out, self._held = self._split(self._held + text)
        self._num_exempt = len(self._held)
        return out

    def finish(self) -> str:
        """What was held back in case it would become a stop string."""
        out, self._held = self._held, ""
        return out

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(self._num_exempt - len(stop) + 1, 0))

    def _split(self, text: str) -> tuple[str, str]:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return text[:start], text[start:]
        return text, ""
