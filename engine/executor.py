"""The executor: what stands between a worker's step loop and the model. No torch, and nothing of ranks, on this side of it.

step loop     chunks ─► run | launch ─► tokens           a step is plain data: token ids, pages, sampling parameters of each chunk
transfers     pages ◄─► blocks of a store                beside the steps, in the order in which they were asked for

LocalExecutor: one process and one device. TensorParallelExecutor (ranks/): what crosses goes on to the ranks of a group; writers,
listeners and futures stay on this side, for when every rank has done its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..protocol.errors import HalfmoonError
from ..protocol.schema import KVSchema
from ..protocol.v1 import common_pb2
from .model_flops import ModelFlops
from .sequence import Sequence, StepChunk
from .work_front import WorkFront

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is): bytes of weights, kernels, graphs"""


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """What a worker has to know of its model and pages."""

    schema: KVSchema
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int
    num_pages: int
    device: str
    weight_bytes: int
    flops: ModelFlops
    peak_flops: float | None  # of the device, a second; None: not known
    row_counts: tuple[int, ...] = ()
    """Rows that steps with chunks are padded to, ascending; empty: they are not."""

    @property
    def page_size(self) -> int:
        """Tokens; a page is a block."""
        return self.schema.block_size


NOT_FINITE = -1  # of kernels/sampling.py: the row's logits are no numbers
NOTHING_LEFT = -2  # the row's logits are sound, and what the request asks for bans every token


MAX_MESSAGE_LOGPROBS = 2**13
"""Log probabilities in a message, about 64 KiB: a worker's event loop makes one in a millisecond."""


class TokenSample(NamedTuple):
    """token_id: below 0 where there was none to draw, and why.

    logprob and top are those of the model's own distribution: before penalties, bias, temperature and filters."""

    token_id: int
    logprob: float | None  # None where the request asked for none
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first

    def to_proto(self) -> common_pb2.TokenOutput:
        top = [common_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in self.top]
        return common_pb2.TokenOutput(token_id=self.token_id, logprob=self.logprob, top_logprobs=top)


class PromptLogprobs(NamedTuple):
    """Of prompt tokens that follow one another, by the model's own distribution. Row i is of token start + i of the prompt."""

    start: int
    logprobs: np.ndarray  # fp32 [tokens]
    ranks: np.ndarray  # int64 [tokens], among all tokens; 1: none is likelier
    top_token_ids: np.ndarray  # int64 [tokens, k], likeliest first
    top_logprobs: np.ndarray  # fp32 [tokens, k]

    def to_protos(self) -> Iterator[common_pb2.PromptLogprobs]:
        """In order, each with a bounded number of them."""
        size = max(1, MAX_MESSAGE_LOGPROBS // (1 + self.top_token_ids.shape[1]))
        for first in range(0, len(self.logprobs), size):
            rows = slice(first, first + size)
            yield common_pb2.PromptLogprobs(
                start=self.start + first,
                logprobs=self.logprobs[rows].tolist(),
                ranks=self.ranks[rows].tolist(),
                top_token_ids=self.top_token_ids[rows].ravel().tolist(),
                top_logprobs=self.top_logprobs[rows].ravel().tolist(),
            )


class StepOutcome(NamedTuple):
    samples: list[TokenSample]  # the next token of every chunk with is_last, in their order
    prompt_logprobs: dict[Sequence, PromptLogprobs]  # of the chunks that score their prompt


class Rows(Protocol):
    """uint8 [bytes of some layers] for each of some blocks; runs: the same as few arrays [blocks of a run, bytes of the layers]."""

    @property
    def runs(self) -> list[np.ndarray]: ...
    def __len__(self) -> int: ...


class Slice(Protocol):
    """Layers from layer on of a run of blocks, as a store gives them."""

    @property
    def layer(self) -> int: ...
    @property
    def first_block(self) -> int: ...
    @property
    def blocks(self) -> Any:
        """Rows, of num_layers layers each."""
        ...

    @property
    def num_layers(self) -> int: ...


class Writer(Protocol):
    """Where blocks go: a lease in a store. It hears of each run of layers as soon as its bytes stand there."""

    present: list[bool]

    @property
    def memory(self) -> np.ndarray | None: ...

    def push(self, layer: int, first_block: int, blocks: np.ndarray) -> None: ...

    def rows(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> Rows: ...

    def pushed(self, layer: int, first_block: int, last_block: int, num_layers: int = 1) -> None: ...

    def dropped(self) -> None: ...

    async def seal(self, state: common_pb2.HandoffState) -> None: ...

    async def abort(self, reason: HalfmoonError) -> None: ...


class NodeMemory(Protocol):
    """A store's memory that processes of its node map: a file, and this process's own mapping of a part of it."""

    @property
    def memory(self) -> np.ndarray: ...
    @property
    def path(self) -> str: ...
    @property
    def offset(self) -> int:
        """Of memory in the file, in bytes."""
        ...


class PushListener(Protocol):
    """Whose blocks are pushed. Any thread asks and tells."""

    @property
    def closed(self) -> bool:
        """Nobody wants them any more: what has not begun is left out."""
        ...

    def push_failed(self, error: HalfmoonError) -> None: ...


@dataclass(frozen=True, slots=True)
class BlockPush:
    """Blocks [first, last) of a sequence's pages, for a writer; of these, the ones that its store lacks."""

    pages: list[int]
    writer: Writer
    first: int
    last: int
    listener: PushListener


class StepFailed(Exception):
    """A step could not be computed, and the device lives. Other chunks can be run, and the same ones again.

    num_pushed_layers: of every push of the step, from the first on, these went to the writers nevertheless.
    """

    def __init__(self, reason: str, num_pushed_layers: int = 0) -> None:
        super().__init__(reason)
        self.num_pushed_layers = num_pushed_layers


class DeviceLost(Exception):
    """No step follows in this process: a device that has failed takes nothing more."""


class InFlightStep(Protocol):
    """A step that was launched."""

    def tokens(self) -> list[int]:
        """One for each chunk that samples, below 0 as TokenSample's. Waits for this step alone, not for those behind it.

        Raises DeviceLost.
        """
        ...


class PageTransfer(Protocol):
    """Pages in and out. Calls return at once and are carried out in their order, beside the steps; any thread may call.

    A sequence's pages have to stay its own until what was asked for them is over (drained).
    """

    schema: KVSchema

    @property
    def front(self) -> WorkFront:
        """Of what was asked for and is not over."""
        ...

    def load(self, pages: Seq[int], piece: Slice) -> Future[None]:
        """A slice into pages, those of the whole sequence. The slice's memory has to stay until the future is done."""
        ...

    def push(self, pushes: Seq[BlockPush], layers: range) -> None:
        """Layers of every push, from pages that no step writes to. What goes wrong is told to the push's listener."""
        ...

    def store(self, pages: Seq[int], writer: Writer, layers: range, are_held: Callable[[], bool] | None = None) -> Future[None]:
        """Layers of all of the writer's blocks. The future raises what the writer raises.

        are_held: asked after each read, whether the pages were the sequence's until now; if not, RequestCancelled. None: nobody takes
            them away.
        """
        ...

    def copy(self, source: int, target: int) -> Future[None]:
        """All layers of a page into another one."""
        ...

    def zero_tail(self, page: int, num_tokens: int) -> None:
        """Clears the tokens from num_tokens on."""
        ...

    def scrub(self, pages: Seq[int]) -> None:
        """As Executor.scrub, for pages that no step writes to."""
        ...

    def when_landed(self, call: Callable[[], None]) -> None:
        """call runs, on a thread, once everything asked for so far is over."""
        ...

    async def drained(self) -> None:
        """Until everything asked for so far is over."""
        ...

    def pin(self, arena: NodeMemory) -> None:
        """Lets the devices copy to and from a store's memory by themselves. Takes a while: call it in a thread."""
        ...

    def unpin(self, memory: np.ndarray) -> None:
        """Behind what was asked for so far; the memory stays mapped until then."""
        ...

    def close(self) -> None:
        """Waits for what was asked for."""
        ...


class Executor(Protocol):
    """run and launch are for one thread, the step loop's; steps run in the order of these calls.

    A chunk's sequence is read, never changed: token_ids, pages and sampling of the request. They may grow while a step runs; a
    step reads what its chunks cover. pages keep their identity as a list until the sequence loses them.
    """

    facts: ExecutorFacts
    pages: PageTransfer

    def run(self, chunks: Seq[StepChunk], pushes: Seq[BlockPush] = ()) -> StepOutcome:
        """Computes the chunks, one of a sequence at most, into the sequences' pages, and waits for all of it.

        The token at output index i of a request is a function of (logits, sampling parameters, tokens so far, i) alone, so that a replay
        on another worker draws the same one.

        Args:
            pushes: blocks that the step finishes. Their layers go to the writers while later layers are computed; some may still be
                on their way when the step is over (PageTransfer.when_landed).

        Raises StepFailed for whatever is wrong with the chunks, one without pages say, or with so many of them; DeviceLost.
        """
        ...

    def launch(self, chunks: Seq[StepChunk], pushes: Seq[BlockPush] = ()) -> InFlightStep | None:
        """Starts a step, with its pushes, and waits for nothing. None, and nothing begun, where this one can't be had that way.

        A chunk may begin where its sequence's token_ids end: it then computes the token that the step launched last gives the
        sequence, whether that has been read or not. Its pages hold that token, too. Raises as run does.
        """
        ...

    def find_not_finite(self, pages: Seq[int]) -> list[int]:
        """The pages with a number that is not finite, behind the steps so far; waits for them."""
        ...

    def scrub(self, pages: Seq[int]) -> None:
        """Behind the steps so far: what of these pages is no finite number becomes 0, so that whoever gets them next meets none."""
        ...

    def close(self) -> None:
        """No step runs, and none follows. Waits for transfers."""
        ...
