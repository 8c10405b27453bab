"""The grammars that a worker's sequences are held to: compiled once each, on a thread and within a limit, while other sequences run.

Grammar ─► compiled (kept, least recently used first out) ─► a GrammarState for each sequence ─► a mask of its next tokens

A state follows from the grammar and the tokens so far. So a replay, a preemption or another worker goes on where the answer stands.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.errors import InvalidRequest
from ..protocol.grammar import Grammar
from ..protocol.sampling import SamplingParams
from ..protocol.tasks import Tasks, untaken
from .compile_lanes import LIMIT_S, CompileLanes, LateError
from .sequence import GrammarState

if TYPE_CHECKING:
    from .grammar_compiler import GrammarCompiler  # imports torch and transformers, a second and 50 MB that few workers need

MAX_KEPT_BYTES = 256 * 2**20
MAX_LATE_KNOWN = 64
"""Grammars that took too long, and are refused at once when they come again."""


class Grammars:
    """Lives on the event loop.

    Args:
        folder: of the model. None: it has none, and every grammar is refused.
        name: of the threads.
        limit_s: that a grammar may take to compile.
    """

    def __init__(self, folder: Path | None, vocab_size: int, eos_token_ids: frozenset[int], name: str, limit_s: float = LIMIT_S) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._limit_s = limit_s
        self._lanes = CompileLanes(name, limit_s)
        self._tasks = Tasks(name)
        self._late: OrderedDict[Grammar, None] = OrderedDict()
        self._compiler: GrammarCompiler | None = None
        self._making_compiler = threading.Lock()
        self._compiled: OrderedDict[Grammar, asyncio.Future[Any]] = OrderedDict()

    def warm_up(self) -> None:
        """In a thread, before any request: reads the vocabulary and imports the compiler, which holds up other threads now and then."""
        try:
            self._get_compiler()
        except InvalidRequest:
            pass  # each request that brings a grammar is told why

    async def state_of(self, params: SamplingParams) -> GrammarState | None:
        """Of a new sequence; None where any text will do.

        Raises InvalidRequest for a grammar that doesn't compile, or takes too long to, or where the model can have none; CheckpointError;
        Overloaded while other grammars that take too long hold all threads.
        """
        if params.grammar is None:
            return None
        compiled = self._compiled.get(params.grammar)
        if compiled is None:
            compiled = self._tasks.start(self._compile(params.grammar))
            self._compiled[params.grammar] = compiled
            compiled.add_done_callback(untaken)
            compiled.add_done_callback(partial(self._keep, params.grammar))
        else:
            self._compiled.move_to_end(params.grammar)
        found = await asyncio.shield(compiled)  # others may wait for it, too
        assert self._compiler is not None
        return self._compiler.state(found, params)

    async def close(self) -> None:
        """What is being compiled ends first, or is late."""
        await self._tasks.close(self._limit_s)

    async def _compile(self, grammar: Grammar) -> Any:
        if grammar not in self._late:
            try:
                return await self._lanes.run(lambda: self._get_compiler().compile(grammar))
            except LateError:
                self._late[grammar] = None
                if len(self._late) > MAX_LATE_KNOWN:
                    self._late.popitem(last=False)
        raise InvalidRequest(f"the {grammar.kind} takes longer than {self._limit_s:g} s to compile; make it simpler", param=grammar.param)

    def _get_compiler(self) -> GrammarCompiler:
        with self._making_compiler:
            if self._compiler is None:
                from .grammar_compiler import GrammarCompiler

                self._compiler = GrammarCompiler.from_folder(self._folder, self._vocab_size, self._eos_token_ids)
            return self._compiler

    def _keep(self, grammar: Grammar, done: asyncio.Future[Any]) -> None:
        if not _is_there(done):
            self._compiled.pop(grammar, None)
            return
        sizes = {one: kept.result().memory_size_bytes for one, kept in self._compiled.items() if _is_there(kept)}
        total = sum(sizes.values())
        for one, num_bytes in sizes.items():
            if total <= MAX_KEPT_BYTES:
                break
            del self._compiled[one]
            total -= num_bytes


def _is_there(compiled: asyncio.Future[Any]) -> bool:
    return compiled.done() and not compiled.cancelled() and compiled.exception() is None
