"""New certificates for a running cluster: the folder is looked at where `halfmoon serve` runs, and Ray carries them to the members.

folder ─► they get on with those that count ─► the supervisor's own ─► every member's
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ..protocol.tls import Tls, member_files
from ..protocol.watched_files import WatchedFiles
from .supervisor import Member, Supervisor

logger = logging.getLogger(__name__)


def watched_certificates(folder: Path, supervisor: Supervisor) -> WatchedFiles:
    return WatchedFiles("members' certificates", member_files(folder), lambda: renew(folder, supervisor))


async def renew(folder: Path, supervisor: Supervisor) -> None:
    """What the folder holds counts for new connections, if it is new. Raises ConfigError, and all stays as it was.

    A member that starts meanwhile has the new ones from its start, or is told like the others.
    """
    credentials = supervisor.credentials
    tls = await asyncio.to_thread(Tls.of_members, folder)
    if tls == credentials.tls:
        return
    await asyncio.to_thread(credentials.renew, tls)
    took = await asyncio.gather(*(_tell(member, tls) for member in supervisor.members if member.actor is not None))
    logger.info("%d members show new certificates from now on", sum(took))


async def _tell(member: Member, tls: Tls) -> bool:
    from ray.exceptions import RayActorError, RayTaskError

    try:
        await member.actor.renew.remote(tls)
    except RayTaskError as error:
        logger.error("%s keeps its old certificates: %s; restart it", member.id, error.cause)
        return False
    except RayActorError as error:  # its next process has them from its start
        logger.debug("%s died before it took new certificates: %s", member.id, error)
        return False
    return True
