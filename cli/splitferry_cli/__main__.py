"""The entry point: `splitferry`, or `python -m splitferry_cli`."""

from __future__ import annotations

import sys

try:
    from .app import splitferry
except KeyboardInterrupt:  # the imports take a moment, and Ctrl-C may come in it
    sys.exit(130)


def main() -> None:
    splitferry.main(prog_name="splitferry")


if __name__ == "__main__":
    main()
