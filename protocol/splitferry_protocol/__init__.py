"""The contract on the wire: ids, records, their bytes, errors and partitioning. No I/O here.

`docs/WIRE.md` is the contract in words, `docs/vectors/` in bytes.
"""

from .codec import (
    InvalidRecord,
    crc_header,
    decode_outcome,
    decode_record,
    encode_abort,
    encode_accepted,
    encode_result,
    encode_split,
)
from .errors import (
    BatchTransferError,
    BatchTransferFailed,
    BatchTransferNotFound,
    SplitTaskFailed,
    VersionMismatch,
    WriteDataFailed,
    WsDataError,
    error_from_wire,
)
from .ids import RequestId, RequestKey
from .partitioning import partition_for
from .paths import path_problem
from .records import Abort, Accepted, Block, Input, Result, Split, Status

__all__ = [
    "Abort",
    "Accepted",
    "BatchTransferError",
    "BatchTransferFailed",
    "BatchTransferNotFound",
    "Block",
    "Input",
    "InvalidRecord",
    "RequestId",
    "RequestKey",
    "Result",
    "Split",
    "SplitTaskFailed",
    "Status",
    "VersionMismatch",
    "WriteDataFailed",
    "WsDataError",
    "crc_header",
    "decode_outcome",
    "decode_record",
    "encode_abort",
    "encode_accepted",
    "encode_result",
    "encode_split",
    "error_from_wire",
    "partition_for",
    "path_problem",
]
