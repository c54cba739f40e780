"""What comes out: one result for each prompt."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations

import msgspec

__all__ = ["Attempt", "ErrorRecord", "Result", "Timings"]


class ErrorRecord(msgspec.Struct, frozen=True):
    """Why a prompt, or an attempt, got no answer.

    * `type`: ``"AgentError"``, ``"Disconnected"``, ``"ProtocolError"``, ``"SlowConsumerError"`` (see there),
      ``"TimeoutError"``, ``"NotCompleted"`` for an answer that the agent ended as cancelled or incomplete, or
      that of a Python exception for a prompt that cannot be sent.
    * `code`: the agent's own for an ``AgentError``; a close code for ``Disconnected`` and ``ProtocolError``;
      the timeout that was reached (``"total"``, ``"first_event"``, ``"idle"``); the status of an answer that
      is not complete; else ``None``.
    * `details`: in words; never the prompt.
    """

    type: str
    code: str | int | None
    details: str


class Timings(msgspec.Struct, frozen=True):
    """When things happened to a prompt, in seconds since the Unix epoch; ``None``: never.

    * `queued`: it was taken from the input.
    * `sent`, `first_event`, `end`: of its last attempt, as in `ResponseStats`.
    """

    queued: float
    sent: float | None
    first_event: float | None
    end: float


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One time that a prompt was given to an agent.

    * `agent`: host, port and path of the agent.
    * `sent`, `first_event`, `end`: as in `Timings`.
    * `error`: why it did not succeed, or ``None``.
    * `partial`: what had arrived of the answer when it failed.
    """

    agent: str
    sent: float | None
    first_event: float | None
    end: float
    error: ErrorRecord | None = None
    partial: str = ""


class Result(msgspec.Struct, frozen=True):
    """The outcome of one prompt: an answer, or an `error`.

    * `id`: of the prompt, or the digest that stands for it. `index`: its place in the input, from 0.
    * `text`, `tokens_used`: the answer; ``None`` if there is an `error`.
    * `attempts`: every time that it was given to an agent, in order.
    * `timings`: when things happened.
    * `error`: ``None``, or that of the last attempt.
    * `columns`: those of the `Prompt`.
    """

    id: str
    index: int
    text: str | None
    tokens_used: int | None
    attempts: tuple[Attempt, ...]
    timings: Timings
    error: ErrorRecord | None
    columns: Mapping[str, object] = {}
