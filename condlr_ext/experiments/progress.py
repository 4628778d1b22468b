"""A bar on stderr: the epochs of a study, and how far the attack on a network is."""

import sys
import time

from .._extras import require


class Progress:
    """One line, of a process of its own at `position` where several share a terminal.

    Args:
        epochs: Of all runs; None if there is nothing to train.
        shown: Whether it is shown at all.
        position: Line on the terminal, from 0.
    """

    def __init__(self, epochs: int | None, shown: bool, position: int = 0):
        self._tqdm = require("tqdm").tqdm
        # a log file gets few lines
        self._interval = 0.1 if sys.stderr and sys.stderr.isatty() else 10
        options = {"total": epochs, "unit": "epoch"} if epochs else {"bar_format": "{desc}{postfix}"}
        self._bar = self._tqdm(
            disable=not shown or not sys.stderr, mininterval=self._interval, position=position, **options
        )
        self._stage, self._began, self._shown = None, 0.0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def epochs(self) -> int:
        return self._bar.n

    def describe(self, text: str) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description(text)

    def advance(self, epochs: int = 1) -> None:
        self._bar.update(epochs)

    def advance_to(self, epochs: int) -> None:
        self.advance(epochs - self.epochs)

    def attack(self, stage: str, done: int, total: int) -> None:
        """Show how far an attack is and what time it has left; for `progress` of the functions of robustness."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._shown = stage, now, 0.0
        if now - self._shown < self._interval:
            return
        self._shown = now
        left = self._tqdm.format_interval((now - self._began) / done * (total - done)) if done else "?"
        self._bar.set_postfix_str(f"{stage}: {done} of {total} samples, {left} left")
