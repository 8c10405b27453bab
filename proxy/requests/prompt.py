"""What is made of a prompt's tokens once, for all choices and both workers of each: the block keys and the encoded token ids.

token ids ─► block keys ─► wire: SequenceSpec(token_ids, block_keys), serialised ─► joined to each choice's message to each worker
A prompt of a million tokens takes tenths of a second, so it is made in parts between which the event loop may serve others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from ...protocol.blocks import BlockKey, block_keys, root_key
from ...protocol.errors import NoWorker
from ...protocol.schema import KVSchema
from ...protocol.v1 import common_pb2, worker_pb2
from ..members.cluster import Cluster

PART_TOKENS = 2**14  # a millisecond or two
MAX_ROOTS = 1024
_LENGTH_DELIMITED = 2  # protobuf's wire type of a message


@dataclass(frozen=True, slots=True)
class Prompt:
    """A replay's prompt includes the tokens already sent."""

    num_tokens: int
    keys: Sequence[BlockKey]  # of its full blocks
    tail: Sequence[int]  # its tokens behind them
    wire: bytes  # a SequenceSpec with token_ids and block_keys alone
    schema: KVSchema  # that the keys are of
    salt: bytes = b""  # of the tenant whose they are


class PromptEncoder:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._rooted: KVSchema | None = None  # whose root keys are
        self._roots: dict[bytes, BlockKey] = {}  # by salt: of tenants, and of requests with a salt of their own

    def encode(self, token_ids: Sequence[int], salt: bytes = b"") -> Prompt:
        """In one go. Raises NoWorker."""
        parts = self.encode_in_parts(token_ids, salt)
        while True:
            try:
                next(parts)
            except StopIteration as done:
                return done.value

    def encode_in_parts(self, token_ids: Sequence[int], salt: bytes = b"") -> Generator[bool, None, Prompt]:
        """Yields False after each part and returns the prompt. Raises NoWorker where nobody has joined who would say what a block is."""
        schema = self._schema()
        block_size, root = schema.block_size, self._root(salt)
        keys: list[BlockKey] = []
        wires: list[bytes] = [common_pb2.SequenceSpec(root=root).SerializeToString()] if salt else []
        part_len = max(PART_TOKENS // block_size, 1) * block_size
        for first in range(0, len(token_ids), part_len):
            part = token_ids[first : first + part_len]
            new = block_keys(root, part, block_size, parent=keys[-1] if keys else None)
            wires.append(_wire(part, new))
            keys += new
            yield False
        return Prompt(len(token_ids), keys, token_ids[len(keys) * block_size :], b"".join(wires), schema, salt)

    def extend(self, prompt: Prompt, token_ids: Sequence[int], sent: Sequence[int]) -> Prompt:
        """The prompt with all tokens that were sent; only what is new is hashed. Raises NoWorker.

        Args:
            prompt: of token_ids and some of sent.
            token_ids: of the request.
        """
        if self._schema() != prompt.schema:
            return self.encode([*token_ids, *sent], prompt.salt)
        unknown = sent[prompt.num_tokens - len(token_ids) :]
        block_size, tail = prompt.schema.block_size, [*prompt.tail, *unknown]
        new = block_keys(self._root(prompt.salt), tail, block_size, parent=prompt.keys[-1] if prompt.keys else None)
        wire = prompt.wire + _wire(unknown, new)
        left = tail[len(new) * block_size :]
        return Prompt(prompt.num_tokens + len(unknown), [*prompt.keys, *new], left, wire, prompt.schema, prompt.salt)

    def refreshed(self, prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
        """The prompt itself, unless the cluster's KV format is another one by now. token_ids: all of it. Raises NoWorker."""
        return prompt if self._schema() == prompt.schema else self.encode(token_ids, prompt.salt)

    def _schema(self) -> KVSchema:
        schema = self._cluster.schema
        if schema is None:
            raise NoWorker("no worker has joined the cluster yet; wait for the workers to load their model")
        if schema is not self._rooted:
            self._rooted, self._roots = schema, {}
        return schema

    def _root(self, salt: bytes) -> BlockKey:
        """Of the schema that _schema has found last."""
        root = self._roots.get(salt)
        if root is None:
            assert self._rooted is not None
            if len(self._roots) >= MAX_ROOTS:
                self._roots.clear()
            root = self._roots[salt] = root_key(self._rooted.fingerprint, salt=salt)
        return root


def to_wire(request: worker_pb2.PrefillRequest | worker_pb2.DecodeRequest, prompt: Prompt) -> bytes:
    """The request's bytes, with the prompt in its sequence.

    To merge the prompt into the message and serialise that takes 50 ms for a million tokens. Joined as bytes it takes one: protobuf
    merges a message field that comes twice, and repeated fields of two messages follow one another.
    """
    tag = request.DESCRIPTOR.fields_by_name["sequence"].number << 3 | _LENGTH_DELIMITED
    return b"".join((request.SerializeToString(), _varint(tag), _varint(len(prompt.wire)), prompt.wire))


def _wire(token_ids: Sequence[int], keys: Sequence[BlockKey]) -> bytes:
    return common_pb2.SequenceSpec(token_ids=token_ids, block_keys=keys).SerializeToString()


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that another byte follows."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))
