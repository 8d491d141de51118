"""What malloc does with the buffers that payloads leave."""

_LARGEST = 16 * 1024 * 1024
"""Bytes: what the contract allows a payload. glibc learns from blocks of up to 32 MiB."""


def keep_freed_memory() -> None:
    """Let glibc keep up to 32 MiB of freed memory for each arena, instead of none.

    It gives large blocks back to the kernel as soon as they are freed, and every page of the next
    buffer is then a page fault: nearly half of the CPU time of sending. glibc adapts to the
    largest block that was mapped and freed; so one is, and none of its pages is touched. Other
    allocators take no notice.
    """
    bytearray(_LARGEST)
