"""All benchmarks, one after the other; each can be run alone and then takes options."""

from __future__ import annotations

import argparse

import memory
import receive


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for benchmark in (receive, memory):
        print(f"\n{benchmark.__name__}: {(benchmark.__doc__ or '').strip()}\n", flush=True)
        benchmark.main([])


if __name__ == "__main__":
    main()
