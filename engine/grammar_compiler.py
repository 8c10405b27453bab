"""Compiles grammars by xgrammar, and says of each sequence which tokens may come next.

tokens so far ─► accepted one by one ─► words of bits: 1 where a token keeps the text within the grammar, or ends it where it may end
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import xgrammar

from ..protocol.errors import InvalidRequest
from ..protocol.grammar import Grammar
from ..protocol.sampling import SamplingParams
from .vocabulary import read_vocabulary

MAX_BLANKS = 32  # in a row, between the parts of a JSON text: without a limit a model may go on with them until its length is used up

_CONTROLS = frozenset(range(32)) - frozenset(b"\r\n")
"""Bytes that a JSON text has nowhere, or (the tab) between its parts alone. The compiler lets them into strings of a limited length."""

NO_TEXT = b"\xff"  # no UTF-8, so that no text of a grammar has it


class GrammarCompiler:
    """Thread-safe, but for state()."""

    def __init__(self, vocabulary: list[bytes], eos_token_ids: frozenset[int]) -> None:
        """Raises InvalidRequest where no token ends an answer."""
        if not eos_token_ids:
            raise InvalidRequest(
                "this model has no end-of-sequence token, which response_format needs; leave it out", param="response_format"
            )
        self._eos_token_ids = eos_token_ids
        self._texts = [b"" if token_id in eos_token_ids else text for token_id, text in enumerate(vocabulary)]
        # a token without text is let through where a grammar names the token itself, and nowhere else
        texts = [text or (b"" if token_id in eos_token_ids else NO_TEXT) for token_id, text in enumerate(self._texts)]
        info = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=sorted(eos_token_ids))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    @classmethod
    def from_folder(cls, folder: Path | None, vocab_size: int, eos_token_ids: frozenset[int]) -> GrammarCompiler:
        """Raises InvalidRequest where the model can be held to no grammar, CheckpointError."""
        if folder is None:
            raise InvalidRequest("this worker knows no tokenizer, which response_format needs; leave it out", param="response_format")
        known = frozenset(token_id for token_id in eos_token_ids if token_id < vocab_size)
        return cls(read_vocabulary(folder, vocab_size), known)

    def compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        """Takes milliseconds to seconds, and lets other threads run. Raises InvalidRequest, with the compiler's own reason."""
        compiler, text = self._compiler, grammar.text
        try:
            if grammar.kind == "json_object":
                return compiler.compile_json_schema('{"type":"object"}', strict_mode=False, max_whitespace_cnt=MAX_BLANKS)
            if grammar.kind == "json_schema":
                return compiler.compile_json_schema(text, max_whitespace_cnt=MAX_BLANKS)
            if grammar.kind == "regex":
                return compiler.compile_regex(text)
            if grammar.kind == "choice":
                return compiler.compile_grammar(_alternatives(json.loads(text)))
            if grammar.kind in ("structural_tag", "tools"):
                return compiler.compile_structural_tag(text)
            return compiler.compile_grammar(text)
        except (RuntimeError, ValueError) as error:
            raise InvalidRequest(f"the {grammar.kind} can't be compiled: {_reason(error)}", param=grammar.param) from error

    def state(self, compiled: xgrammar.CompiledGrammar, params: SamplingParams) -> MatcherState:
        textless = (token_id for token_id in params.stop_token_ids if token_id < len(self._texts) and not self._texts[token_id])
        bounds_strings = params.grammar is not None and _bounds_strings(params.grammar)
        return MatcherState(
            compiled, sorted({*self._eos_token_ids, *textless}), params.min_tokens, self._without_controls if bounds_strings else None
        )

    @functools.cached_property
    def _without_controls(self) -> np.ndarray:
        """As MatcherState.fill's words: 1 for each token whose text has none of them."""
        plain = np.array([_CONTROLS.isdisjoint(text) for text in self._texts] + [False] * (-len(self._texts) % 32))
        return np.packbits(plain, bitorder="little").view(np.int32)


class MatcherState:
    """Where one sequence stands in its grammar. One thread at a time."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, ending: list[int], min_tokens: int, within: np.ndarray | None = None) -> None:
        """
        Args:
            ending: tokens that end the answer, where the grammar lets it end.
            within: as fill's words: the tokens that may be in the answer at all. None: any.
        """
        self._compiled = compiled
        self._ending = ending
        self._min_tokens = min_tokens
        self._within = within
        self._begin()

    def fill(self, output_token_ids: Seq[int], words: np.ndarray) -> None:
        """Which tokens may follow. Before min_tokens the answer ends only where nothing else can follow.

        Args:
            output_token_ids: all tokens of the answer so far.
            words: int32 [ceil(vocab_size / 32)], overwritten.

        Raises ValueError for tokens that the grammar does not let through: another grammar gave them.
        """
        if len(output_token_ids) < self._num_accepted:
            self._begin()
        for token_id in output_token_ids[self._num_accepted :]:
            if not self._matcher.accept_token(token_id):
                raise ValueError(f"token {token_id}, number {self._num_accepted + 1} of the answer, is not within its grammar")
            self._num_accepted += 1
        self._matcher.fill_next_token_bitmask(words.reshape(1, -1))
        if self._within is not None:
            words &= self._within
        if len(output_token_ids) < self._min_tokens:
            self._ban_ends(words)

    def _begin(self) -> None:
        self._matcher = xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=self._ending)
        self._num_accepted = 0

    def _ban_ends(self, words: np.ndarray) -> None:
        kept = words.copy()
        for token_id in self._ending:
            kept[token_id // 32] &= ~np.int32(np.uint32(1 << token_id % 32).view(np.int32))
        if kept.any():
            words[...] = kept


def _bounds_strings(grammar: Grammar) -> bool:
    """Calls of tools aside: their parser escapes what JSON has not, and their text may have tabs."""
    return grammar.kind in ("json_schema", "structural_tag") and ('"minLength"' in grammar.text or '"maxLength"' in grammar.text)


def _alternatives(choices: list[str]) -> str:
    """In EBNF."""
    return "root ::= " + " | ".join(json.dumps(choice) for choice in choices)


def _reason(error: Exception) -> str:
    """Without the compiler's own time and place."""
    return re.sub(r"^\[[^\]]*\] \S+: ?", "", str(error).strip().replace("\n", " "))
