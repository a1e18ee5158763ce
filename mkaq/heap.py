"""glibc's heap, which keeps what is freed unless told otherwise. Elsewhere nothing happens."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MIB = 1024 * 1024


def return_freed_memory() -> None:
    """Gives freed heap back to the system.

    The allocator keeps it otherwise, in holes between the small tensors of one layer and the large
    ones of the next, and a walk's memory grows by about a layer a layer.
    """
    _glibc("malloc_trim", 0)


def arrange_heap(*, sparing: bool) -> None:
    """Chooses between less memory and less time.

    Args:
        sparing: Every tensor of 1 MiB or more lies in pages of its own, which go back when it is freed.
            The allocator raises this limit by itself, to 32 MiB, and how many holes its heap then has
            depends on how threads run. On a Llama 1024 wide the peak of quantizing a layer varied by
            12 % between layers and runs (by 8 % with a limit of 4 MiB), and varies by 1 % with this, in
            about 15 % more time, since the system clears new pages. Otherwise the heap keeps what is
            freed for what comes next, until `return_freed_memory`.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, (1 if sparing else 32) * MIB)
    _glibc("mallopt", M_TRIM_THRESHOLD, (1 if sparing else 128) * MIB)


def _glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
