"""Checkpoints, as workers write them, and those that no worker wrote: of trials that were stopped or stand paused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from cerebro_tune import state
from cerebro_tune.book import TrialBook, TrialPage
from cerebro_tune.buffers import Mapped
from cerebro_tune.clock import Clock
from cerebro_tune.ledger import FullDisk


class Exporter:
    """Writes committed states as checkpoints, on a thread of its own so that the loop goes on meanwhile."""

    def __init__(self, book: TrialBook, clock: Clock, disk: FullDisk, durable: bool) -> None:
        self._book, self._disk, self._durable = book, disk, durable
        self._thread = clock.beside("export")
        self.pending = 0

    def due(self, page: TrialPage) -> bool:
        """Whether the trial's last state is to be written, and is not."""
        return self._book.keep != "none" and page.units > 0 and page.last_checkpoint is None

    def write(self, page: TrialPage, buffer: Mapped) -> None:
        """Write the state in `buffer` as the trial's last checkpoint."""
        path, recipe = self._book.path(page, "last"), self._book.recipe_of(page)
        digest = recipe.keep(state.read(buffer), path, self._disk.stand_still, self._durable)
        if digest:
            page.digests["last"] = digest
        page.last_checkpoint = path

    def begin(self, page: TrialPage, buffer: Mapped, then: Callable[[Future[None]], object]) -> None:
        """Write it on the thread; `then` is called there, and is to see that `conclude` is called on the loop's."""
        self.pending += 1
        self._thread.submit(self.write, page, buffer).add_done_callback(then)

    def conclude(self, done: Future[None]) -> str | None:
        """One that was begun is done; returns what went wrong, if something did."""
        self.pending -= 1
        error = done.exception()
        return None if error is None else f"its last checkpoint could not be written: {error}"

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown()
