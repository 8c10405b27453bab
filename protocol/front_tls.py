"""The certificate of the clients' ports, as it is now: its files may change while the proxy runs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError
from .tls import read_pem
from .tls_handshake import handshake, load_chain, why


class Pair(NamedTuple):
    """PEM."""

    key: bytes
    certificate: bytes


class FrontCertificate:
    """Any authority's, so that only what can be told without it is looked at: that the key belongs to it, and its dates.

    Raises ConfigError.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self.paths = certificate, key
        self.now = self._read()

    def read(self) -> Pair:
        """What the files hold now, once it is known to work. What counts stays as it is. Raises ConfigError."""
        found = self._read()
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it trusts the certificate itself
        try:
            client.load_verify_locations(cadata=found.certificate.decode("ascii", "ignore"))
            handshake(self._server(found), client, None)
        except ssl.SSLError as error:
            raise self._unusable(error) from error
        return found

    def _read(self) -> Pair:
        certificate, key = self.paths
        found = Pair(read_pem(key), read_pem(certificate))
        self._server(found)
        return found

    def _server(self, pair: Pair) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            load_chain(context, pair.certificate, pair.key)
        except ssl.SSLError as error:
            raise self._unusable(error) from error
        return context

    def _unusable(self, error: ssl.SSLError) -> ConfigError:
        certificate, key = self.paths
        return ConfigError(f"{certificate} with {key} can't be used: {why(error)}; write both anew", key="proxy.tls_certificate")
