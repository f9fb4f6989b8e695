"""Copies, gathers and writes checkpoints in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from . import checkpoint as checkpoints
from .evaluation import Evaluations
from .gathering import HostCopies, Share, Tensors, assembled
from .run_folder import RunFolder

MakeSnapshot = Callable[[Tensors, Tensors], checkpoints.Snapshot]


class Writer:
    """Makes checkpoints in a thread of its own, one at a time. `error` is why the last one is not there.

    What `evaluations` has not exported yet stays; it is rotated away as soon as it is exported.

    group: gloo's process group, over which ranks send what they hold; needed where they hold different parts.
    """

    def __init__(self, run: RunFolder, evaluations: Evaluations | None = None) -> None:
        self.run, self.evaluations = run, evaluations
        self.error: Exception | None = None
        self.group: Any = None
        self._keep: int | None = None
        self._thread: threading.Thread | None = None
        self._copies, self._copied = HostCopies(), threading.Event()
        self._copied.set()

    def start(self, shares: list[Share], names: list[str], snapshot: MakeSnapshot | None, keep: int | None) -> None:
        """Copy this rank's `shares` and send them to rank zero, which writes what `snapshot` makes of all ranks' and
        removes all but the newest `keep`. Nothing else may be under way.

        Every rank has to call it, rank zero alone with `snapshot`. Shares may change again after `wait_for_copies`.
        """
        ready = None
        if any(share.held.is_cuda for share in shares):
            ready = torch.cuda.Event()
            ready.record()
        self.done()
        self._copied.clear()
        words = (shares, ready, names, snapshot, keep)
        self._thread = threading.Thread(target=self._make, args=words, name="checkpoint")
        self._thread.start()

    def wait_for_copies(self) -> None:
        """Wait until what the last checkpoint is made of has been copied from this rank's device."""
        self._copied.wait()

    def done(self, seconds: float | None = None) -> bool:
        """Whether nothing is being written any more, after so many seconds at most."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _make(
        self,
        shares: list[Share],
        ready: torch.cuda.Event | None,
        names: list[str],
        snapshot: MakeSnapshot | None,
        keep: int | None,
    ) -> None:
        self.error = None
        try:
            try:
                copies = self._copies.make(shares, ready)
            finally:
                self._copied.set()
            tensors = assembled(shares, copies, names, self.group, keep=snapshot is not None)
            if snapshot is not None:
                self._write(snapshot(*tensors), keep)
        except Exception as error:  # whatever it is, the ranks have to know
            self.error = error

    def _write(self, snapshot: checkpoints.Snapshot, keep: int | None) -> None:
        self._keep = keep
        checkpoints.write(self.run.path / "checkpoints", snapshot, keep, self.run.settings.keep_every, self._pinned())
        self.run.note_checkpoint(snapshot.state["step"])
        if self.evaluations is not None:
            self.evaluations.written(snapshot.state["step"])

    def rotate(self) -> None:
        """Remove what an export has kept from being removed. From any thread."""
        checkpoints.rotate(self.run.path / "checkpoints", self._keep, self.run.settings.keep_every, self._pinned())

    def _pinned(self) -> set[int]:
        """Return the steps whose checkpoints stay."""
        waiting = self.evaluations.pinned() if self.evaluations is not None else set()
        return waiting | set(self.run.settings.keep_steps)
