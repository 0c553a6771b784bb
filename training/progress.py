"""How far a long job is: a bar on a terminal and in notebooks, elsewhere a plain line every half minute."""

from __future__ import annotations

import logging
import sys
import threading
import time

from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds, or a twentieth of the time so far, in which what arrives belongs together: a batch comes all at once."""


class Progress:
    """Counts what is done, at what rate and cost, and says how long the rest will take; a context manager.

    The time that is left is worked out from whole batches that are done, and not said before there is one. Where there
    is no bar, a line goes to the log at level INFO of `peft_psr.training.progress`, or to stderr if nobody listens:
    every `interval` seconds, also while nothing arrives.

    Args:
        title: What is being done.
        total: How much there is; `None` where that is not known yet.
        done: How much was done before, by a run that was stopped; not counted in the rate.
        interval: Seconds between lines.
        unit: What is counted, for the bar.
        shown: Whether to show anything.

    Attributes:
        title: As given; may be changed, as may `total`.
        note: What else to say, such as the loss.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        done: int = 0,
        interval: float = 30.0,
        unit: str = "completions",
        shown: bool = True,
    ) -> None:
        self.title, self.total, self.done, self.interval, self.shown = title, total, done, interval, shown
        self.note = ""
        self.tokens = self.failures = 0
        self._start = self._logged = time.monotonic()
        self._made = 0
        self._last: float | None = None  # when something arrived
        self._seen = self._start  # when the evidence was taken
        self._evidence: tuple[float, int] | None = None  # seconds, and what was made in them
        self._ended = threading.Event()
        self._timer: threading.Thread | None = None
        self._bar = None
        if shown and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=f" {unit}",
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
        elif shown:
            logger.info("%s: %d of %s done before", title, done, "?" if total is None else total)

    def advance(self, count: int = 1, tokens: int = 0, failures: int = 0, kept: bool = False) -> None:
        """Counts `count` more things done, which cost `tokens`, and `failures` that are not done.

        With `kept` they were there already, and say nothing of the time that others take.
        """
        now = time.monotonic()
        if count and not kept:
            pause = max(PAUSE, (now - self._start) / 20)
            if self._last is None:
                self._seen = now
            elif now - self._seen >= pause:
                self._evidence, self._seen = (self._last - self._start, self._made), now
            self._made += count
            self._last = now
        self.done += count
        self.tokens += tokens
        self.failures += failures
        if self._bar is not None:
            self._bar.update(count)
        self._show(now)

    def line(self) -> str:
        """Returns how far it is, in one line."""
        percent = 100 * self.done / self.total if self.total else 100
        share = "" if self.total is None else f" of {self.total} ({percent:.0f}%)"
        return ", ".join([f"{self.title}: {self.done}{share}", *self._details()])

    def close(self) -> None:
        """Ends the bar, or says the last line."""
        self._ended.set()
        if self._timer is not None:
            self._timer.join()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._details()), refresh=True)
            self._bar.close()
        elif self.shown:
            logger.info("%s", self.line())

    def _details(self) -> list[str]:
        details = []
        rate = self._rate()
        if rate:
            details.append(f"{rate:,.1f}/s" if rate >= 1 else f"{_duration(1 / rate)} each")
        if self.tokens:
            details.append(f"{self.tokens:,} tokens")
        if self.failures:
            details.append(f"{self.failures} failed")
        if self.note:
            details.append(self.note)
        if rate and self.total is not None and self.done < self.total:
            details.append(f"{_duration((self.total - self.done) / rate)} left")
        return details

    def _rate(self) -> float | None:
        """Things a second, from what is done to the last pause; `None` while that is one thing or none."""
        now = time.monotonic()
        seconds, made = self._evidence or (0.0, 0)
        over = self.total is not None and self.done >= self.total
        if self._last is not None and (over or now - self._last >= max(PAUSE, (now - self._start) / 20)):
            seconds, made = self._last - self._start, self._made
        return made / seconds if made > 1 and seconds > 0 else None

    def _show(self, now: float) -> None:
        if self._bar is not None:
            self._bar.set_description_str(self.title, refresh=False)
            self._bar.set_postfix_str(", ".join(self._details()), refresh=False)
        elif self.shown and now - self._logged >= self.interval:
            self._logged = now
            if logger.isEnabledFor(logging.INFO):
                logger.info("%s", self.line())
            else:
                print(self.line(), file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self._ended.wait(PAUSE if self._bar is not None else self.interval):
            self._show(time.monotonic())
            if self._bar is not None:
                self._bar.total = self.total
                self._bar.refresh()

    def __enter__(self) -> Progress:
        if self.shown:
            self._timer = threading.Thread(target=self._tick, name=f"progress of {self.title}", daemon=True)
            self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _duration(seconds: float) -> str:
    """`0.5 s`, `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
