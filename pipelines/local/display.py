"""What a person sees of a run: live bars on a terminal, plain lines in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 15.0


class Display:
    """Shows the steps of a run; progress texts look like `12/36 loss=0.61 left=3:20`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, stage: str) -> None:
        """A step began."""
        self._began[stage] = time.monotonic()
        if self._live:
            self._tasks[stage] = self._bars.add_task(stage, total=None, words="")
        else:
            self._print(f"{stage}: started")

    def finished(self, stage: str) -> None:
        """A step ended well."""
        if self._live and stage in self._tasks:
            self._bars.update(self._tasks[stage], total=1, completed=1, words="done")
            self._bars.stop_task(self._tasks[stage])
        else:
            self._print(f"{stage}: done in {time.monotonic() - self._began.get(stage, time.monotonic()):.0f} s")

    def cached(self, stage: str) -> None:
        """A step was served from the cache."""
        if self._live:
            task = self._bars.add_task(stage, total=1, completed=1, words="nothing changed: from the cache")
            self._bars.stop_task(task)
        else:
            self._print(f"{stage}: nothing changed, from the cache")

    def note(self, stage: str, sentence: str) -> None:
        """A step said something worth keeping."""
        self._print(f"{stage}: {sentence}")

    def progress(self, stage: str, text: str) -> None:
        """A step says how far it is."""
        count, _, words = text.partition(" ")
        done, _, total = count.partition("/")
        if self._live and stage in self._tasks and done.isdigit() and total.isdigit():
            shown = words.replace("_per_s=", "/s=").replace("=", " ")
            self._bars.update(self._tasks[stage], total=int(total), completed=int(done), words=f"{count} {shown}")
        elif not self._live and (time.monotonic() - self._last_line > LINE_EVERY_S or done == total):
            self._last_line = time.monotonic()
            self._print(f"{stage}: {text}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
