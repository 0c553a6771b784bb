"""How far a long job is: a bar on a terminal, a plain log line now and then where there is none."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm


logger = logging.getLogger(__name__)


class Progress:
    """Counts what is done, at what rate and cost, and says how long the rest will take; a context manager.

    On a terminal it is a bar on stderr. Elsewhere it logs a line at the start, at the end and every `interval`
    seconds, at level INFO of `peft_psr.training.progress`.

    Args:
        title: What is being done.
        total: How much there is.
        done: How much was done before, by a run that was stopped; not counted in the rate.
        interval: Seconds between log lines.
    """

    def __init__(self, title: str, total: int, done: int = 0, interval: float = 30.0) -> None:
        self.title, self.total, self.done, self.interval = title, total, done, interval
        self.tokens = self.failures = 0
        self._before, self._start = done, time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, unit=" completions", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._logged = self._start
        if self._bar is None:
            logger.info("%s: %d of %d done before", title, done, total)

    def advance(self, count: int = 1, tokens: int = 0, failures: int = 0) -> None:
        """Counts `count` more things done, which cost `tokens`, and `failures` that are not done."""
        self.done += count
        self.tokens += tokens
        self.failures += failures
        if self._bar is not None:
            self._bar.set_postfix_str(self._cost(), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._logged >= self.interval:
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        """Returns how far it is, in one line."""
        rate = (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)
        left = f", {_duration((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        share = 100 * self.done / self.total if self.total else 100
        return f"{self.title}: {self.done} of {self.total} ({share:.0f}%), {rate:,.1f}/s, {self._cost()}{left}"

    def _cost(self) -> str:
        failed = f", {self.failures} failed" if self.failures else ""
        return f"{self.tokens:,} tokens{failed}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            logger.info("%s", self.line())


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
