"""What a start prints, on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from halfmoon.deploy.cli.progress import StartupProgress, amount
from halfmoon.protocol.load_progress import LoadProgress


def weights(done: int, total: int = 16_000_000_000) -> LoadProgress:
    return LoadProgress("loading weights", done, total)


def test_amounts_are_bytes_for_weights_and_numbers_for_the_rest() -> None:
    assert amount(weights(9_800_000_000, 16_100_000_000)) == "9.8 of 16.1 GB"
    assert amount(weights(5_000_000, 21_000_000)) == "5.0 of 21.0 MB"
    assert amount(LoadProgress("compiling kernels", 7, 24)) == "7 of 24"


def test_without_a_terminal_there_are_plain_lines_a_few_for_each_stage() -> None:
    text = io.StringIO()
    with StartupProgress(Console(file=text, width=200)) as progress:
        progress.notify("prefill-0", "starting")
        for percent in range(101):
            progress.notify("prefill-0", weights(percent * 160_000_000))
        progress.notify("prefill-0", LoadProgress("capturing graphs", 13, 13))
        progress.notify("prefill-0", "up")
    lines = [line.strip() for line in text.getvalue().splitlines()]
    assert lines[:5] == [f"prefill-0: loading weights, {done} of 16.0 GB" for done in ("0.0", "4.0", "8.0", "12.0", "16.0")]
    assert lines[5] == "prefill-0: capturing graphs, 13 of 13" and lines[6].startswith("prefill-0 up after") and len(lines) == 7


def test_on_a_terminal_every_member_that_starts_has_a_line_and_a_bar_for_what_it_loads() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with StartupProgress(console) as progress:
        for member_id in ("proxy", "prefill-0", "decode-0"):
            progress.notify(member_id, "starting")
        progress.notify("proxy", "up")
        progress.notify("prefill-0", weights(4_000_000_000))
        progress.notify("decode-0", LoadProgress("compiling kernels", 7, 24))
        shown = Console(file=io.StringIO(), width=120, record=True)
        shown.print(progress._table())
        lines = shown.export_text().splitlines()
    assert [line.split()[1] for line in lines] == ["prefill-0", "decode-0"], "who is up has no line any more"
    assert "loading weights" in lines[0] and "4.0 of 16.0 GB" in lines[0] and "━" in lines[0]
    assert "compiling kernels" in lines[1] and "7 of 24" in lines[1]
    assert "proxy up after" in text.getvalue()


def test_a_member_that_dies_while_it_loads_starts_its_line_again() -> None:
    text = io.StringIO()
    with StartupProgress(Console(file=text, width=120)) as progress:
        for event in ("starting", weights(8_000_000_000), "died", "starting again", weights(8_000_000_000)):
            progress.notify("decode-0", event)
        shown = Console(file=io.StringIO(), width=120, record=True)
        shown.print(progress._table())
    assert shown.export_text().count("decode-0") == 1
