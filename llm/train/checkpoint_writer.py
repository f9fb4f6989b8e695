"""Writes checkpoints in a thread of its own."""

from __future__ import annotations

import threading

from . import checkpoint as checkpoints
from .evaluation import Evaluations
from .run_folder import RunFolder


class Writer:
    """Writes checkpoints in a thread of its own, one at a time. `error` is why the last one is not there.

    What `evaluations` has not exported yet stays; it is rotated away as soon as it is exported.
    """

    def __init__(self, run: RunFolder, evaluations: Evaluations | None = None) -> None:
        self.run, self.evaluations = run, evaluations
        self.error: Exception | None = None
        self._keep: int | None = None
        self._thread: threading.Thread | None = None

    def start(self, snapshot: checkpoints.Snapshot, keep: int | None) -> None:
        """Write `snapshot`, and remove all but the newest `keep`; nothing else may be under way."""
        self._thread = threading.Thread(target=self._write, args=(snapshot, keep), name="checkpoint")
        self._thread.start()

    def done(self, seconds: float | None = None) -> bool:
        """Whether nothing is being written any more, after so many seconds at most."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _write(self, snapshot: checkpoints.Snapshot, keep: int | None) -> None:
        self.error, self._keep = None, keep
        try:
            checkpoints.write(
                self.run.path / "checkpoints", snapshot, keep, self.run.settings.keep_every, self._pinned()
            )
            self.run.note_checkpoint(snapshot.state["step"])
            if self.evaluations is not None:
                self.evaluations.written(snapshot.state["step"])
        except Exception as error:  # whatever it is, the ranks have to know
            self.error = error

    def rotate(self) -> None:
        """Remove what an export has kept from being removed. From any thread."""
        checkpoints.rotate(self.run.path / "checkpoints", self._keep, self.run.settings.keep_every, self._pinned())

    def _pinned(self) -> set[int]:
        """Return the steps whose checkpoints stay."""
        waiting = self.evaluations.pinned() if self.evaluations is not None else set()
        return waiting | set(self.run.settings.keep_steps)
