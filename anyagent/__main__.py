"""``python -m anyagent`` is the command ``anyagent``."""

from .cli import main

main()
