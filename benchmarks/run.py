"""All benchmarks, one after the other, and the page made of them; each can be run alone and then
takes options. One that fails says so, and the others go on."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback

import report
from rounds import RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "benchmarks", nargs="*", default=report.BENCHMARKS, help=f"of {report.BENCHMARKS}"
    )
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True)
    told = parser.parse_args()
    began = time.monotonic()
    failed = []
    for number, name in enumerate(told.benchmarks, 1):
        minutes = (time.monotonic() - began) / 60
        print(f"\n[{number}/{len(told.benchmarks)}, {minutes:.1f} min] {name}", flush=True)
        (RESULTS / f"{name}.json").unlink(missing_ok=True)  # not the result of this run
        try:
            benchmark = importlib.import_module(name)
            print(benchmark.__doc__, flush=True)
            benchmark.main([])
        except (Exception, SystemExit) as error:
            failed.append(name)
            traceback.print_exception(error)
            print(f"\n{name} has failed, the others go on", flush=True)
    if told.report:
        report.main([])
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes; failed: {', '.join(failed) or 'none'}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
