"""Shows a cluster's start: on a terminal one line for each member, with a bar for what it loads; elsewhere plain lines.

⠸ proxy      starting                                        2 s
⠸ prefill-0  loading weights ━━━━━━━━━━╺━━━━━  9.8 of 16.1 GB  7 s
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from ...protocol.load_progress import LoadProgress

BAR_WIDTH = 30
BYTES = ("weights",)  # stages that end in one of these count bytes; the others count things
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
PLAIN_STEP = 0.25  # of a stage, between two plain lines


class StartupProgress:
    def __init__(self, console: Console) -> None:
        self._events: dict[str, str | LoadProgress] = {}
        self._since: dict[str, float] = {}
        self._printed: dict[str, tuple[str, int]] = {}  # member -> stage and quarter of its last plain line
        self._console = console
        self._live = (
            Live(console=console, refresh_per_second=8, get_renderable=self._table, transient=True) if console.is_terminal else None
        )
        self._starting, self._quiet = True, False

    def __enter__(self) -> StartupProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def notify(self, member_id: str, event: str | LoadProgress) -> None:
        """The Supervisor's notify. During the start it updates the table; afterwards it prints a line each time."""
        self._since.setdefault(member_id, time.monotonic())
        self._events[member_id] = event
        if isinstance(event, LoadProgress):
            if self._live is None and not self._quiet:
                self._print_plain(member_id, event)
        elif event == "up" and self._starting:
            self._print(f"  {member_id} up after {time.monotonic() - self._since[member_id]:.1f} s", "dim")
        elif not self._starting and not self._quiet:
            self._print(f"  {member_id}: {event}", "yellow" if event != "up" else "green")

    def done(self, *, quiet: bool = False) -> None:
        """Ends the table. quiet: prints nothing from now on."""
        self._starting, self._quiet = False, quiet

    def _print_plain(self, member_id: str, progress: LoadProgress) -> None:
        step = progress.stage, int(_share(progress) / PLAIN_STEP)
        if self._printed.get(member_id) != step:
            self._printed[member_id] = step
            self._print(f"  {member_id}: {progress.stage}, {amount(progress)}", "dim")

    def _print(self, line: str, style: str) -> None:
        self._console.print(line, style=style, highlight=False)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for member_id, event in self._events.items():
            if event == "up":
                continue
            since = f"{time.monotonic() - self._since[member_id]:.0f} s"
            if isinstance(event, LoadProgress):
                bar = ProgressBar(total=max(event.total, 1), completed=event.done, width=BAR_WIDTH)
                table.add_row(Spinner("dots"), member_id, event.stage, bar, amount(event), since)
            else:
                table.add_row(Spinner("dots"), member_id, event, "", "", since)
        return table


def amount(progress: LoadProgress) -> str:
    """ "9.8 of 16.1 GB", "7 of 24"."""
    if not progress.stage.endswith(BYTES):
        return f"{progress.done} of {progress.total}"
    size, unit = next((found for found in UNITS if progress.total >= found[0]), (1.0, "bytes"))
    return f"{progress.done / size:.1f} of {progress.total / size:.1f} {unit}"


def _share(progress: LoadProgress) -> float:
    return progress.done / max(progress.total, 1)
