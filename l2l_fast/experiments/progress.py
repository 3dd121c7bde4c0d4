"""The console, and progress bars for whatever takes longer than a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, amount: int = 1, *, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A progress bar with the time left, gone when the work is done; silent where nobody watches."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: int = 1, *, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance
