"""The process of a rank other than 0: `python -m halfmoon.engine.ranks.process '{"rank": 1, …}'`, which rank 0 starts.

main thread    steps ─► the engine, as rank 0's       pages' thread   pages.py       a thread reads standard input: its end is rank 0's
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from ...protocol.config import ModelOptions
from ...protocol.log_context import FORMAT, NameRequest
from ..engine import Engine
from ..model_config import ModelConfig
from ..rank_group import Meeting
from ..resolve import resolve_folder
from ..shard import Shard
from .link import Link, of_text
from .memory import SharedMemory
from .pages import RankPages
from .processes import FAILED
from .step_wire import Kind, StepReader

logger = logging.getLogger(__name__)

HERE = 1  # the first message on the steps' link


def main(told: dict[str, Any]) -> None:
    """Returns when rank 0 is gone."""
    steps, pages = (Link(socket.socket(fileno=told[name])) for name in ("steps", "pages"))
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    try:
        _serve(told, steps, pages)
    except Exception as error:  # the process's boundary: rank 0 has to hear why
        _fail(pages, error)


def _serve(told: dict[str, Any], steps: Link, pages: Link) -> None:
    shard, options = Shard(told["rank"], told["size"]), ModelOptions(**told["options"])
    shard.require_fits(ModelConfig.from_folder(resolve_folder(options)))
    steps.send([HERE])
    engine = Engine.load(options, meeting=Meeting(shard, Path(told["meeting"])), **told["load"])
    logger.info("%s", engine.described())
    rank_pages = RankPages(engine, shard, pages, SharedMemory(told["memory"]), lambda error: _fail(pages, error))
    threading.Thread(target=_serve_pages, args=(rank_pages, pages), name="rank-pages", daemon=True).start()
    reader = StepReader()
    while (message := steps.receive()) is not None:
        kind, *rest = message
        if kind == Kind.FIND_NOT_FINITE:
            steps.send(engine.cache.find_not_finite(rest))
        elif kind == Kind.SCRUB:
            engine.cache.scrub(rest)
        else:
            step = reader.read(message)
            after_layer = rank_pages.progress.hook(step.number) if step.has_pushes else None
            if kind == Kind.LAUNCH:
                engine.launch(step.chunks, after_layer=after_layer)
            else:
                engine.compute(step.chunks, after_layer=after_layer)


def _serve_pages(rank_pages: RankPages, pages: Link) -> None:
    try:
        rank_pages.serve()
    except Exception as error:  # the thread's boundary, as main's
        _fail(pages, error)


def _end_with_rank_0() -> NoReturn:
    """A step may hang for ever in a call to the group, so the process does not wait for it."""
    sys.stdin.buffer.read()
    os._exit(0)


def _fail(pages: Link, error: BaseException) -> NoReturn:
    logger.error("the rank failed", exc_info=error)
    try:
        pages.send([FAILED, *of_text(f"{type(error).__name__}: {error}")])
    finally:
        os._exit(1)


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.addFilter(NameRequest())
    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=[handler])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with rank 0, however that is told to end
    main(json.loads(sys.argv[1]))
