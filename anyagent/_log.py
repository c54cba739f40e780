"""The logger ``anyagent``.

* ERROR: no connection came about in as many attempts as were allowed.
* WARNING: a connection was lost or could not be replaced, a response failed because nobody read it.
* INFO: the agent announced that it will disconnect, a connection was replaced.
* DEBUG: a connection was opened or closed.

No record holds anything that an agent or the application has said: no text, no header, no reason of a close
frame, of a URL only the host and the port. Nothing is logged for a single event.
"""

from __future__ import annotations

import logging
from typing import Final

__all__ = ["logger"]

logger: Final = logging.getLogger("anyagent")
logger.addHandler(logging.NullHandler())  # else Python prints warnings of an application without logging
