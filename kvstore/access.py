"""How a process opens its sessions, the same at every store: who it is, what KV it holds, what it shows."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.credentials import Credentials
from ..protocol.schema import KVSchema
from .client import StoreClient
from .transport import TransportChoice


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """As StoreClient.attach's."""

    client_id: str
    node_id: str
    schema: KVSchema
    transport: TransportChoice = "auto"
    credentials: Credentials | None = None

    async def attach(self, address: str) -> StoreClient:
        """Raises as StoreClient.attach."""
        return await StoreClient.attach(
            address,
            client_id=self.client_id,
            node_id=self.node_id,
            schema=self.schema,
            transport=self.transport,
            credentials=self.credentials,
        )
