"""What is made of a prompt's tokens once, for all choices and both workers of each: the block keys and the encoded token ids.

token ids ─► block keys ─► SequenceSpec(token_ids, block_keys) ─copied─► each choice's message to each worker
A prompt of a million tokens takes tenths of a second, so it is made in parts between which the event loop may serve others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from ...protocol.blocks import BlockKey, block_keys, root_key
from ...protocol.errors import NoWorker
from ...protocol.schema import KVSchema
from ...protocol.v1 import common_pb2
from ..members.cluster import Cluster

PART_TOKENS = 2**14  # some tenths of a millisecond


@dataclass(frozen=True, slots=True)
class Prompt:
    """A replay's prompt includes the tokens already sent."""

    token_ids: Sequence[int]
    keys: Sequence[BlockKey]  # of its full blocks
    spec: common_pb2.SequenceSpec  # token_ids and block_keys alone
    schema: KVSchema  # that the keys are of


class PromptEncoder:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._rooted: KVSchema | None = None  # whose root key is
        self._root = b""

    def encode(self, token_ids: Sequence[int]) -> Prompt:
        """In one go. Raises NoWorker."""
        parts = self.encode_in_parts(token_ids)
        while True:
            try:
                next(parts)
            except StopIteration as done:
                return done.value

    def encode_in_parts(self, token_ids: Sequence[int]) -> Generator[bool, None, Prompt]:
        """Yields False after each part and returns the prompt. Raises NoWorker where nobody has joined who would say what a block is."""
        schema = self._schema()
        block_size, spec = schema.block_size, common_pb2.SequenceSpec()
        keys: list[BlockKey] = []
        part_len = max(PART_TOKENS // block_size, 1) * block_size
        for first in range(0, len(token_ids), part_len):
            part = token_ids[first : first + part_len]
            keys += block_keys(self._root, part, block_size, parent=keys[-1] if keys else None)
            spec.token_ids.extend(part)
            yield False
        spec.block_keys.extend(keys)
        return Prompt(token_ids, keys, spec, schema)

    def extend(self, prompt: Prompt, sent: Sequence[int]) -> Prompt:
        """The prompt and tokens behind it; only what is new is hashed. Raises NoWorker."""
        token_ids = [*prompt.token_ids, *sent]
        if self._schema() != prompt.schema:
            return self.encode(token_ids)
        block_size, num_keys = prompt.schema.block_size, len(prompt.keys)
        parent = prompt.keys[-1] if num_keys else None
        new = block_keys(self._root, token_ids[num_keys * block_size :], block_size, parent=parent)
        spec = common_pb2.SequenceSpec()
        spec.CopyFrom(prompt.spec)
        spec.token_ids.extend(sent)
        spec.block_keys.extend(new)
        return Prompt(token_ids, [*prompt.keys, *new], spec, prompt.schema)

    def refreshed(self, prompt: Prompt) -> Prompt:
        """The prompt itself, unless the cluster's KV format is another one by now. Raises NoWorker."""
        return prompt if self._schema() == prompt.schema else self.encode(prompt.token_ids)

    def _schema(self) -> KVSchema:
        schema = self._cluster.schema
        if schema is None:
            raise NoWorker("no worker has joined the cluster yet; wait for the workers to load their model")
        if schema is not self._rooted:
            self._rooted, self._root = schema, root_key(schema.fingerprint)
        return schema
