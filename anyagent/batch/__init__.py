"""Batch runs: many prompts in, one result for each.

* `open_batch` gives the results of any iterable of prompts, `run_batch` returns them all to synchronous code;
  a `BatchConfig` says which agents to ask, and how.
* `FileRun` goes from a file of prompts to a durable file of answers, which a later run goes on with.

The formats of files are those of the command ``anyagent batch``; Parquet needs the extra ``parquet``, and the
lock on the output needs POSIX.
"""

from ._batch import Batch, open_batch, run_batch
from ._config import BUSY_CODES, Adaptive, AttemptTimeouts, BatchConfig, Rates, Retry
from ._engine import TooManyErrors
from ._files.answered import OutputError
from ._files.fsync import Fsync
from ._files.inputs import InputError
from ._files.job import FileJob
from ._files.run import FileRun, Progress
from ._metrics.histogram import Percentiles
from ._metrics.summary import Summary
from ._prompt import Prompt
from ._result import Attempt, ErrorRecord, Result, Timings

__all__ = [
    "BUSY_CODES",
    "Adaptive",
    "Attempt",
    "AttemptTimeouts",
    "Batch",
    "BatchConfig",
    "ErrorRecord",
    "FileJob",
    "FileRun",
    "Fsync",
    "InputError",
    "OutputError",
    "Percentiles",
    "Progress",
    "Prompt",
    "Rates",
    "Result",
    "Retry",
    "Summary",
    "Timings",
    "TooManyErrors",
    "open_batch",
    "run_batch",
]
