"""What an application does with one agent while the connection is harmed: drawn, carried out and judged."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import anyio
import anyio.lowlevel
from hypothesis import strategies as st

from anyagent import IM, OM, Agent, AnyAgentError, ConnectError, Disconnected, Heartbeat, Timeouts, open_agent

from .proxy import Coalesce, Cut, Delay, Fault, Faults, Flip, HalfClose, Reset, Split, Stall, Throttle

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from anyagent.testing import AgentReply

__all__ = ["Plan", "Player", "Request", "Way", "answer", "plans"]

Way: TypeAlias = Literal["ask", "stream", "break", "cancel", "tool"]

OUTPUT: Final = "the tool's output"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is answered with so many `chunks`, after `pauses` turns of the event loop.

    * "ask", "stream": read to the end.
    * "break": left when `patience` chunks have been read.
    * "cancel": read in a scope that is cancelled after `patience` turns of the event loop.
    * "tool": streamed; before the last chunk, the agent calls a tool.
    """

    way: Way
    chunks: int
    pauses: int
    patience: int


@dataclasses.dataclass(frozen=True)
class Plan:
    requests: tuple[Request, ...]
    faults: Faults

    @property
    def harmless(self) -> bool:
        """Whether the faults change no more than when the bytes come, and in how many reads."""
        return all(isinstance(each, Split | Coalesce | Delay | Throttle) for each in self._all_faults)

    @property
    def corrupting(self) -> bool:
        return any(isinstance(each, Flip) for each in self._all_faults)

    @property
    def _all_faults(self) -> tuple[Fault, ...]:
        return self.faults.to_agent + self.faults.to_client


_requests = st.builds(
    Request,
    way=st.sampled_from(["ask", "stream", "break", "cancel", "tool"]),
    chunks=st.integers(0, 6),
    pauses=st.integers(0, 3),
    patience=st.integers(0, 8),
)
_offsets = st.integers(160, 1_500) | st.integers(0, 1_500)  # most of them behind the handshake
_harmless = st.one_of(
    st.builds(Split, st.integers(1, 20)),
    st.builds(Coalesce, st.just(0.001)),
    st.builds(Delay, st.just(0.001)),
    st.builds(Throttle, st.just(200_000)),
)
_harmful = st.one_of(
    st.builds(Cut, _offsets),
    st.builds(Reset, _offsets),
    st.builds(HalfClose, _offsets),
    st.builds(Stall, _offsets),
    st.builds(Flip, _offsets, st.integers(0, 7)),
)
_directions = st.one_of(
    st.just(()),
    st.tuples(_harmless),
    st.tuples(_harmful),
    st.tuples(_harmless, _harmful),
)
plans: Final = st.builds(
    Plan,
    requests=st.lists(_requests, min_size=1, max_size=6).map(tuple),
    faults=st.builds(Faults, to_agent=_directions, to_client=_directions),
)


async def answer(message: IM.UserMessage, reply: AgentReply) -> None:
    """The agent of all plans: its chunks have the prompt's name in them, which no other prompt has."""
    match message.metadata:
        case {"chunks": int(chunks), "tool": bool(tool)}:
            for number in range(chunks):
                await reply.text(chunk(message.text, number))
            if tool:
                await reply.text(await reply.tool_call("tool", "{}"))
        case _:  # a bit of it was flipped
            await reply.error("bad_request", "no such metadata")


def chunk(prompt: str, number: int) -> str:
    return f"<{prompt}, {number}>"


class Player:
    """Carries out a plan, whose prompts begin with `name`; in `main`, the tasks of all requests."""

    def __init__(self, plan: Plan, name: str, url: str) -> None:
        self.endings: collections.Counter[str] = collections.Counter()
        self._plan = plan
        self._name = name
        self._url = url
        patient = Timeouts(connect=10, close=5, drain=5)
        self._timeouts = patient if plan.harmless else Timeouts(connect=0.5, close=0.2, drain=0.2)
        self._heartbeat = None if plan.harmless else Heartbeat(interval=0.05, timeout=0.05)
        # A request may wait for an answer to an id, or for a frame of a length, that a flipped bit has made.
        self._deadline = 0.2 if plan.corrupting else float("inf")

    @property
    def prompts(self) -> list[str]:
        # The name is there twice, so that no single flipped bit makes it that of another plan.
        return [f"{self._name}/{self._name}.{number}" for number in range(len(self._plan.requests))]

    async def main(self) -> None:
        try:
            async with open_agent(self._url, timeouts=self._timeouts, heartbeat=self._heartbeat) as agent:
                async with anyio.create_task_group() as tasks:
                    for prompt, request in zip(self.prompts, self._plan.requests, strict=True):
                        for _ in range(request.pauses):
                            await anyio.lowlevel.checkpoint()
                        tasks.start_soon(self._run, agent, request, prompt, tasks)
                while agent.in_flight:  # an answer that was left drains, where the wire cannot cancel
                    await anyio.lowlevel.checkpoint()
            assert agent.in_flight == 0
        except ConnectError:
            assert not self._plan.harmless
            assert not self.endings
            self.endings["ConnectError"] += 1
        else:
            assert self.endings.total() == len(self._plan.requests)

    async def _run(self, agent: Agent, request: Request, prompt: str, tasks: TaskGroup) -> None:
        """One request, from its beginning to its one end."""
        texts: list[str] = []
        with anyio.CancelScope() as scope:
            if request.way == "cancel":
                tasks.start_soon(_cancel_later, scope, request.patience)
            try:
                with anyio.fail_after(self._deadline):
                    await self._read(agent, request, prompt, texts)
            except AnyAgentError as exc:
                self._judge(exc)
                ending = type(exc).__name__
                texts += [exc.partial.text] if exc.partial is not None else []
            except TimeoutError:
                assert self._plan.corrupting
                ending = "TimeoutError"
            else:
                ending = "left" if request.way == "break" else "completed"
        if scope.cancelled_caught:
            ending = "cancelled"
        self.endings[ending] += 1
        if not self._plan.corrupting:  # else it may be any other text, or one that was meant for another id
            whole = self._whole(request, prompt)
            arrived = "".join(texts)
            assert "".join(whole).startswith(arrived)
            assert request.way == "ask" or texts == whole[: len(texts)]
            assert ending != "completed" or arrived == "".join(whole)

    def _judge(self, error: AnyAgentError) -> None:
        assert not self._plan.harmless
        assert self._plan.corrupting or isinstance(error, Disconnected)

    def _whole(self, request: Request, prompt: str) -> list[str]:
        chunks = [chunk(prompt, number) for number in range(request.chunks)]
        return [*chunks, OUTPUT] if request.way == "tool" else chunks

    async def _read(self, agent: Agent, request: Request, prompt: str, texts: list[str]) -> None:
        metadata = {"chunks": request.chunks, "tool": request.way == "tool"}
        if request.way == "ask":
            texts.append((await agent.ask(prompt, metadata=metadata)).text)
            return
        async with await agent.send_message(prompt, metadata=metadata) as response:
            async for event in response:
                if isinstance(event, OM.EventToolCall):
                    await response.send_tool_result(event.call_id, OUTPUT)
                elif isinstance(event, OM.EventTextChunk):
                    texts.append(event.text)
                if request.way == "break" and len(texts) >= request.patience:
                    return
            assert response.end is not None


async def _cancel_later(scope: anyio.CancelScope, turns: int) -> None:
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    scope.cancel()
