"""The cluster's token for those who operate it, in a file of the user who started `halfmoon serve`: ~/.halfmoon/PORT.token, by the port
of the proxy's control. HALFMOON_CLUSTER_TOKEN goes before it, there and here; with TLS HALFMOON_CERTS names the folder of certificates.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..client import Control
from ..protocol.address import split_address
from ..protocol.credentials import VARIABLE, Credentials
from ..protocol.errors import ConfigError

CERTS_VARIABLE = "HALFMOON_CERTS"
logger = logging.getLogger(__name__)


def folder() -> Path:
    return Path("~/.halfmoon").expanduser()


@contextlib.contextmanager
def token_file(control: Control) -> Iterator[None]:
    """The token, and in a second line the folder of certificates if there is one, for as long as the block runs.

    Where none can be written it is a warning: the cluster works without.
    """
    path = _path(control.address)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)  # one of a cluster that was killed; never written through, for it may be a link
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(f"{control.token}\n{control.certs}")
    except OSError as error:
        logger.warning("cannot write %s (%s); `halfmoon status` and its like need %s", path, error.strerror, VARIABLE)
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_control(address: str) -> Control:
    """address: of the proxy's control. Raises ConfigError where its token is not to be found."""
    if (given := Credentials.from_environment()) is not None:
        return Control(address, given.token, os.environ.get(CERTS_VARIABLE, ""))
    path = _path(address)
    try:
        token, _, certs = path.read_text().partition("\n")
        return Control(address, token, certs)
    except OSError as error:
        raise ConfigError(
            f"no token of the cluster at {address}: {path} cannot be read ({error.strerror}); is `halfmoon serve` running, as this user "
            f"and on this machine? Elsewhere set {VARIABLE} there and here; --control names another address"
        ) from error


def _path(control_address: str) -> Path:
    return folder() / f"{split_address(control_address)[1]}.token"
