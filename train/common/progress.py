"""Progress of long work on stderr: a bar on a terminal, a line every 20 seconds in a log."""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 20.0


class Progress(tqdm):
    """tqdm's bar. In a log each state is a line of its own, also while nothing has advanced.

    Work that takes less than LOG_SECONDS leaves no line in a log. Arguments: those of tqdm.
    """

    def __init__(self, *args: Any, **options: Any):
        self._end, self._beat = threading.Event(), time.time()
        if sys.stderr.isatty():
            return super().__init__(*args, dynamic_ncols=True, mininterval=0.5, **options)
        super().__init__(
            *args, ncols=110, ascii=True, mininterval=LOG_SECONDS, miniters=0, delay=LOG_SECONDS,
            **options,
        )  # fmt: skip
        if not self.disable:
            threading.Thread(target=self._keep_printing, daemon=True).start()

    def _keep_printing(self) -> None:
        while not self._end.wait(LOG_SECONDS / 4):
            now = time.time()
            if now - max(self.last_print_t, self._beat) >= LOG_SECONDS:
                self._beat = now
                self.refresh()

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Returns the function that prints a state."""
        if file.isatty():
            return tqdm.status_printer(file)

        def line(text: str) -> None:
            if text:
                file.write(f"{text.rstrip()}\n")
                file.flush()

        return line

    def close(self) -> None:
        """Prints the last state."""
        self._end.set()
        super().close()


def duration(seconds: float) -> str:
    """Returns a time in words, in its two largest units: "3 h 20 min"."""
    total = max(1, round(seconds))
    for unit, size, part, parts in (("d", 86_400, "h", 24), ("h", 3_600, "min", 60)):
        if total >= size:
            rounded = round(total / size * parts)
            return f"{rounded // parts} {unit} {rounded % parts} {part}"
    return f"{round(total / 60)} min" if total >= 120 else f"{total} s"
