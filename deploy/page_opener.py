"""Reads metrics pages. With TLS they show the members' certificate, which is for all members' one name and not for a host's."""

from __future__ import annotations

import http.client
import ssl
import urllib.request
from collections.abc import Callable
from typing import Any

from ..protocol.errors import ConfigError
from ..protocol.tls import MEMBER_NAME

PageOpener = Callable[[str, float], Any]
"""(host:port/path, seconds to wait) -> the reply, a context. Raises OSError."""


def page_opener(authority: bytes | None, token: str = "") -> PageOpener:
    """authority: PEM of the cluster's; None: its pages have no TLS. token: for pages that ask for one. Raises ConfigError."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    if authority is None:
        return lambda page, timeout_s: urllib.request.urlopen(  # nosec B310
            urllib.request.Request(f"http://{page}", headers=headers), timeout=timeout_s
        )
    try:
        context = ssl.create_default_context(cadata=authority.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the authority's certificate can't be used: {error}; name the cluster's authority.pem") from error
    opener = urllib.request.build_opener(_MembersHandler(context=context))
    return lambda page, timeout_s: opener.open(urllib.request.Request(f"https://{page}", headers=headers), timeout=timeout_s)


class _MembersConnection(http.client.HTTPSConnection):
    """As its base, but for the name that is asked for."""

    def __init__(self, *args: Any, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(*args, context=context, **options)
        self._members_context = context

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._members_context.wrap_socket(self.sock, server_hostname=MEMBER_NAME)


class _MembersHandler(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._members_context = context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        kind: Any = _MembersConnection
        return self.do_open(kind, req, context=self._members_context)
