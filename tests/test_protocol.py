from __future__ import annotations

import sys
import types
from subprocess import run

import splitferry_protocol

EXPORTED = """
    Abort Accepted BatchTransferError BatchTransferFailed BatchTransferNotFound Block Input
    InvalidRecord RequestId RequestKey Result Split SplitTaskFailed Status VersionMismatch
    WriteDataFailed WsDataError crc_header decode_outcome decode_record encode_abort
    encode_accepted encode_result encode_split error_from_wire partition_for path_problem
"""


def test_what_is_exported() -> None:
    assert splitferry_protocol.__all__ == EXPORTED.split()
    public = {
        name
        for name, value in vars(splitferry_protocol).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(splitferry_protocol.__all__)


def test_the_contract_imports_neither_side() -> None:
    script = (
        "import splitferry_protocol, sys;"
        "print([m for m in sys.modules if m.startswith('splitferry_')"
        " and not m.startswith('splitferry_protocol')])"
    )
    told = run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
