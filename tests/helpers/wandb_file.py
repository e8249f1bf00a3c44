"""The records of an offline wandb run: its transaction log, which has LevelDB's block format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 1 << 15  # bytes: of the file, and of a piece of a record; of a block
WHOLE, LAST = 1, 4  # kinds of pieces


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of every offline run below a folder, in the order of their files; ``_step`` among their keys."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.rglob("run-*.wandb")):
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if items:
                rows.append({"_step": record.history.step.num, **items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block is too short for a piece
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
