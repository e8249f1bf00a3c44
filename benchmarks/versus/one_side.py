"""One side of ``benchmarks.paired``: prints a line of JSON for each line of standard input.

Run by path, not imported: ``benchmarks`` and ``fastrl`` come from the checkout in ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.versus.ours import Fastrl
from benchmarks.versus.work import Work, make_records
from fastrl.models.load import load_tokenizer


def main() -> None:
    """Build the run of ``argv[1]``, then run a step for each line of standard input."""
    given = json.loads(sys.argv[1])
    work, folder = Work(**given["work"]), Path(given["folder"])
    records = make_records(work, work.prompts * given["steps"], Path(given["pictures"]), load_tokenizer(folder))
    side = Fastrl(folder, work, work.group, records, train="full", device=torch.device("cpu"))
    for number, _ in enumerate(sys.stdin, 1):
        begin, cpu = time.perf_counter(), time.process_time()
        row, _ = side.run.step(number)
        spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(spent | {"grad_norm": row["grad_norm"]}), flush=True)


if __name__ == "__main__":
    main()
