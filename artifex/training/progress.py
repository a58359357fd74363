"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from artifex.cli import silence

BESIDE = 31  # columns of a terminal that bar and times take at least, beside the numbers of steps
LINES = 20  # plain lines in a whole run, where there is no terminal


class _Console(Console):
    """One whose reader may go away (`| head`): then nothing more is printed, and the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence()


def fitting(status: str, width: int) -> str:
    """As many of the clauses of a status, which stand two blanks apart, as fit into so many columns; the first does."""
    first, *rest = status.split("  ")
    for clause in rest:
        if len(first) + 2 + len(clause) > width:
            break
        first += f"  {clause}"
    return first


class Report:
    """A bar with ETA, loss, tokens/s, and what else there is room for; `line` prints above it, or before it is there.

    Quiet, it says nothing at all: of several processes only the first one prints.
    """

    def __init__(self, start: int, steps: int, *, bar: bool, quiet: bool = False):
        self.console = _Console(highlight=False, soft_wrap=True, force_jupyter=False, quiet=quiet)
        self.steps, self.began, self.start, self.printed = steps, time.perf_counter(), start, start
        self.bar, self.status = None, "first steps"
        if bar and not quiet and self.console.file.isatty():  # a notebook asks for colours and is no terminal
            self.bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                expand=True,
            )
            self.task = self.bar.add_task("training", total=steps, completed=start, status=self.status)

    def busy(self, what: str) -> contextlib.AbstractContextManager[object]:
        """While something takes long before the bar is there: says what, where there is a terminal."""
        return self.console.status(what) if self.console.file.isatty() else contextlib.nullcontext()

    def __enter__(self) -> Report:
        self.began = time.perf_counter()
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def line(self, text: str) -> None:
        """Print a line that stays. Where it cannot be written, as to a file on a full disk, the run goes on without."""
        with contextlib.suppress(OSError):  # a reader who left is answered in `on_broken_pipe`
            self.console.print(text, markup=False)

    def advance(self, step: int, status: str | None) -> None:
        """Say that `step` is done; `status` replaces what stands beside the bar."""
        if self.bar:
            beside = BESIDE + 2 * len(str(self.steps))
            self.status = fitting(status, self.console.width - beside) if status else self.status
            self.bar.update(self.task, completed=step, status=self.status)
        elif status and (step == self.steps or step - self.printed >= self.steps / LINES):
            self.printed = step
            spent = time.perf_counter() - self.began
            left = spent / max(step - self.start, 1) * (self.steps - step)
            self.line(f"step {step}/{self.steps}  {status}  ETA {left:.0f} s")
