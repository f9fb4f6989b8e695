"""Memory that a process on a CPU frees stays with it while it trains.

glibc gives a piece of more than 32 MB back to the system as soon as it is freed. To get it again, zeroed page by page,
takes as long as to multiply the matrices that fill it, and every step needs the same pieces.
"""

import ctypes
from typing import Any

import lightning.pytorch as pl

# mallopt(3): malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
NEVER = -1
LARGEST = 32 * 2**20  # up to where glibc raises its own threshold to what is freed; set by hand it no longer moves


def keep_freed_memory(keep: bool) -> None:
    """Keep it from now on; or give back what is free, and again every large piece as soon as it is freed.

    Does nothing where the C library is another than glibc.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(MMAP_MAX, 0 if keep else 65536)
    libc.mallopt(TRIM_THRESHOLD, NEVER if keep else 2 * LARGEST)
    if not keep:
        libc.malloc_trim(0)


class FreedMemory(pl.Callback):
    """Keeps it during a fit on a CPU, where `model.retain_freed_memory` says so."""

    kept = False

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.kept = module.retain_freed_memory and module.device.type == "cpu"
        if self.kept:
            keep_freed_memory(True)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.kept:
            keep_freed_memory(False)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, module)
