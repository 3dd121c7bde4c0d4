"""A progress bar for downloads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on the error console, moved on by the function it yields.

    There is none where nobody watches or rich is not installed.
    """
    if importlib.util.find_spec("rich") is None:
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, completed=done, total=total)
        yield lambda amount: bar.update(task, advance=amount)
