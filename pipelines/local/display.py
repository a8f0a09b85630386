"""Progress display of a run: live bars on a terminal, plain lines otherwise."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from components.tracking.events import Event
from pipelines.terminal import terminal

LINE_EVERY_S = 15.0


class Display:
    """Shows the events of a run's steps; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[details]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started_at: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: Event) -> None:
        """Show an event; errors are not shown here but at the end of the run."""
        match event.kind:
            case "started":
                self._started(event.stage)
            case "finished":
                self._finished(event.stage)
            case "cached":
                self._cached(event.stage)
            case "progress":
                self._progress(event)
            case "note":
                self._print(f"{event.stage}: {event.message}")
            case "error":
                pass

    def _started(self, stage: str) -> None:
        self._started_at[stage] = time.monotonic()
        if self._live:
            self._tasks[stage] = self._bars.add_task(stage, total=None, details="")
        else:
            self._print(f"{stage}: started")

    def _finished(self, stage: str) -> None:
        if self._live and stage in self._tasks:
            self._bars.update(self._tasks[stage], total=1, completed=1, details="done")
            self._bars.stop_task(self._tasks[stage])
        else:
            self._print(f"{stage}: done in {time.monotonic() - self._started_at.get(stage, time.monotonic()):.0f} s")

    def _cached(self, stage: str) -> None:
        if self._live:
            task = self._bars.add_task(stage, total=1, completed=1, details="cached")
            self._bars.stop_task(task)
        else:
            self._print(f"{stage}: cached")

    def _progress(self, event: Event) -> None:
        if self._live and event.stage in self._tasks:
            details = event.details().replace("_per_s=", "/s=").replace("=", " ")
            self._bars.update(
                self._tasks[event.stage],
                total=event.total,
                completed=event.done,
                details=str(terminal(f"{event.count()} {details}")),
            )
        elif not self._live and (time.monotonic() - self._last_line > LINE_EVERY_S or event.done == event.total):
            self._last_line = time.monotonic()
            self._print(f"{event.stage}: {event.count()} {event.details()}".rstrip())

    def _print(self, text: str) -> None:
        self.console.print(terminal(text), soft_wrap=True)
