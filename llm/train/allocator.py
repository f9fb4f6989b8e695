"""Memory that a process on a CPU frees stays with it.

glibc gives a piece of more than 32 MB back to the system as soon as it is freed. To get it again, zeroed page by page,
takes as long as to multiply the matrices that fill it, and every step needs the same pieces.
"""

import ctypes

# mallopt(3): malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
NEVER = -1
LARGEST = 32 * 2**20  # where glibc's own threshold ends up after pieces of any size; set by hand it no longer moves


def keep_freed_memory(keep: bool) -> None:
    """Keep it from now on; or again as glibc does by itself, with what is free given back.

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
