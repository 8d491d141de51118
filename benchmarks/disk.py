"""Writes random bytes to files and syncs each: what the disk can do at most, without Kafka.
A side runs it as a process of its own, with one thread."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def write(directory: Path, files: int, size: int, step: int) -> tuple[float, float]:
    """Create, write, sync and rename each; the moments before the first and after the last."""
    data = os.urandom(step)
    first = time.time()
    for number in range(files):
        path = directory / f"{number}.part"
        with path.open("wb", buffering=0) as file:
            for offset in range(0, size, step):
                file.write(data[: size - offset])
            os.fsync(file)
        path.rename(directory / str(number))
    return first, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    for name in ("files", "size", "step"):
        parser.add_argument(name, type=int)
    told = parser.parse_args()
    first, last = write(told.directory, told.files, told.size, told.step)
    print(json.dumps({"first": first, "last": last}), flush=True)
    sys.stdin.read()  # stay until the last look at this process


if __name__ == "__main__":
    main()
