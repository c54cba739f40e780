"""What anyagent and its peers cost: a replay server, a fresh process for each measurement, tables and plots.

Run it as ``python -m benchmarks``, in a clone of the repository.
"""
