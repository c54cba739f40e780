"""A fresh process for one repetition: ``python -m benchmarks.worker JOB`` (JSON); prints a `WorkerAnswer`."""

from __future__ import annotations

import os
import sys
from typing import Final

import msgspec

from . import clients, scenarios

__all__ = ["CANNOT_LOAD"]

CANNOT_LOAD: Final = 3
"""The exit code where the client itself cannot be imported."""


def main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=scenarios.Job)
    if job.cpu is not None:
        os.sched_setaffinity(0, {job.cpu})
    if job.client in clients.NAMES:
        try:
            clients.load(job.client)
        except ImportError as exc:
            print(f"{job.client} cannot be loaded: {exc} (pip install -e '.[bench]')", file=sys.stderr)
            raise SystemExit(CANNOT_LOAD) from None
    answer = scenarios.find(job.scenario).run(job)
    print(msgspec.json.encode(answer).decode())


if __name__ == "__main__":
    main()
