"""Batch runs: many prompts in, one result for each."""

from ._batch import Batch, open_batch, run_batch
from ._config import BUSY_CODES, Adaptive, AttemptTimeouts, BatchConfig, Rates, Retry
from ._engine import TooManyErrors
from ._prompt import Prompt
from ._result import Attempt, ErrorRecord, Result, Timings
from ._summary import Summary

__all__ = [
    "BUSY_CODES",
    "Adaptive",
    "Attempt",
    "AttemptTimeouts",
    "Batch",
    "BatchConfig",
    "ErrorRecord",
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
