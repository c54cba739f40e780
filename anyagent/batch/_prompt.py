"""What is asked: one row of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations

import msgspec

__all__ = ["Prompt", "key_of"]

_KEY_SIZE = 16  # bytes; two of a million million keys are equal by a chance of 1 in 10 ** 15


class Prompt(msgspec.Struct, frozen=True):
    """One prompt of a batch.

    * `text`: what the agent is sent.
    * `id`: the row's name in the output; with ``None``, a digest of the rest and of the agent's name.
    * `conversation`, `metadata`: as in `Agent.send_message`.
    * `columns`: anything else; comes out again with the result, and is not sent.
    """

    text: str
    id: str | None = None
    conversation: str | None = None
    metadata: Mapping[str, object] | None = None
    columns: Mapping[str, object] = {}


def key_of(prompt: Prompt, agent: str) -> str:
    """What tells the row of `prompt` from others: its id, or a digest of it, its options and `agent`."""
    if prompt.id is not None:
        return prompt.id
    try:
        said = msgspec.json.encode(
            (agent, prompt.text, prompt.conversation, prompt.metadata), order="deterministic"
        )
    except (TypeError, ValueError, OverflowError, RecursionError):  # it has no encoding, and cannot be sent
        said = f"{agent} {prompt.text}".encode(errors="surrogatepass")
    return hashlib.blake2b(said, digest_size=_KEY_SIZE).hexdigest()
