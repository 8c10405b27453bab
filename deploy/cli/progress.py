"""What a cluster's start looks like on a terminal: one line a member, a spinner while it waits."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table


class StartupProgress:
    def __init__(self, console: Console) -> None:
        self._events: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._table, transient=True)
        self._console = console
        self._starting, self._quiet = True, False

    def __enter__(self) -> StartupProgress:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def notify(self, member_id: str, event: str) -> None:
        """As Supervisor's notify: during the start into the table, afterwards a line each."""
        self._since.setdefault(member_id, time.monotonic())
        self._events[member_id] = event
        if event == "up" and self._starting:
            self._console.print(f"  {member_id} up after {time.monotonic() - self._since[member_id]:.1f} s", style="dim", highlight=False)
        elif not self._starting and not self._quiet:
            self._console.print(f"  {member_id}: {event}", style="yellow" if event != "up" else "green", highlight=False)

    def done(self, *, quiet: bool = False) -> None:
        """The start is over. quiet: nothing more is printed."""
        self._starting, self._quiet = False, quiet

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for member_id, event in self._events.items():
            if event != "up":
                table.add_row(Spinner("dots"), member_id, event, f"{time.monotonic() - self._since[member_id]:.0f} s")
        return table
