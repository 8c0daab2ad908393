"""Agents, guides and work that a worker process can import."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from aggregator import LLM, Module, ParameterNode, bundle
from aggregator.errors import AggregatorError, ConfigError
from aggregator.llm.ledger import count
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest, Rollout, RolloutTask, Sample, Usage

BASE_URL = "http://127.0.0.1:9/v1"


def answer(text: str) -> HTTPReply:
    """Build a chat completion."""
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
    }
    return HTTPReply(status=200, body=msgspec.json.encode(body), headers={})


class Scripted(Transport):
    """A transport that returns these answers in order, then the length of the request; records the requests."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.requests: list[HTTPRequest] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.requests.append(request)
        return answer(self.texts.pop(0) if self.texts else f"{len(request.body)}")


def even(x: Any, output: Any, info: Any) -> tuple[float, str]:
    """Score 1 for an even number."""
    return float(isinstance(output, int) and output % 2 == 0), f"got {output}"


def tasks(*inputs: Any, **options: Any) -> list[RolloutTask]:
    """Return one task for each input, each with its own lineage."""
    return [RolloutTask(sample=Sample(i, x), lineage=("train", f"sample={i}"), **options) for i, x in enumerate(inputs)]


class Adder(Module):
    """Adds its parameter; its code is a parameter too."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = ParameterNode(amount)

    @bundle(trainable=True)
    def twist(self, x: int) -> int:
        """Change the input."""
        return x

    def forward(self, x: int) -> int:
        return self.twist(x) + self.amount.data

    def is_even(self, x: Any, output: int, info: Any) -> float:
        """A guide that reads the agent's parameter."""
        return float(self.amount.data)


class Located(Adder):
    """Returns the id of its process."""

    async def forward(self, x: int) -> int:  # type: ignore[override]
        await asyncio.sleep(0.05)
        return os.getpid()


class Noting(Adder):
    """Records each time that it is unpickled."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def forward(self, x: int) -> int:
        time.sleep(0.05)
        return os.getpid()


class Asking(Module):
    """Calls its model in the way that its input names."""

    def __init__(self, llm: Any, other: Any = None) -> None:
        self.llm = llm
        self.other = other
        self.prompt = ParameterNode("Answer.")

    async def forward(self, x: str) -> Any:  # noqa: C901 - one way of asking after the other
        ask = f"{self.prompt.data} {x}"
        match x.split(maxsplit=1)[0]:
            case "thread":
                return await asyncio.get_running_loop().run_in_executor(None, lambda: self.llm(ask).text)
            case "loop":
                return await asyncio.get_running_loop().run_in_executor(None, self._in_a_loop, ask)
            case "stream":
                return [delta async for delta in self.llm.stream(ask)]
            case "twice":
                return [await self._text(ask), await self._text(ask)]
            case "made":
                made = LLM("openai-compatible/tiny", base_url=BASE_URL, max_attempts=1)
                return (await made.complete(ask)).text
            case "keyed":
                made = LLM("openai-compatible/tiny", base_url=BASE_URL, api_key="sk-made-in-worker")
                return (await made.complete(ask)).text
            case "other":
                return (await self.other.complete(ask, max_tokens=7)).text
            case "hide":
                try:
                    return await self._text(ask)
                except Exception:  # noqa: BLE001 - what an agent does
                    return "hidden"
            case "validate":
                completion = await self.llm.complete(ask, response_format={"type": "json_object"}, validate=self.check)
                return completion.text
            case "secret":
                return repr({**vars(self.llm), **os.environ}), str(vars(self.llm).get("budget"))
        return await self._text(ask)

    def _in_a_loop(self, ask: str) -> str:
        with asyncio.Runner() as runner:
            return runner.run(self._text(ask))

    async def _text(self, ask: str) -> str:
        text: str = (await self.llm.complete(ask)).text
        return text

    def check(self, text: str) -> None:
        if text != '{"good": 1}':
            raise ValueError("not good")


class Judging:
    """A guide that calls a model."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    async def __call__(self, x: str, output: str, info: Any) -> float:
        await self.llm.complete(f"Is {output} right?")
        return 1.0


class Odd(Module):
    """Misbehaves: exits, hangs, or returns what cannot be pickled."""

    def __init__(self, notes: Path | None = None) -> None:
        self.notes = notes
        self.amount = ParameterNode(1)

    async def forward(self, x: str) -> Any:  # noqa: C901 - one thing after the other
        match x:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "fork and die":
                start_child(pass_fds=_sockets())
                os.kill(os.getpid(), signal.SIGKILL)
            case "child":
                assert self.notes is not None
                self.notes.write_text(str(start_child().pid))
                await asyncio.sleep(3600)
            case "lock":
                return threading.Lock()
            case "interrupt":
                raise KeyboardInterrupt
            case "raise":
                raise TwoArgumentsError("one", 2)
            case "sleep":
                return await self._sleep()
            case "block":
                assert self.notes is not None
                block(self.notes)
            case "thread":
                assert self.notes is not None
                self.notes.write_text(str(os.getpid()))
                threading.Thread(target=time.sleep, args=[3600]).start()
        return x

    async def _sleep(self) -> None:
        assert self.notes is not None
        self.notes.write_text("asleep")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            self.notes.write_text("woken")


def start_child(**options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)


def block(notes: Path) -> None:
    notes.write_text(str(os.getpid()))
    time.sleep(3600)


def _sockets() -> list[int]:
    """Return the descriptors of this process's sockets."""
    return [int(path.name) for path in Path("/proc/self/fd").iterdir() if "socket" in os.path.realpath(path)]


class TwoArgumentsError(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, first: str, second: int) -> None:
        super().__init__(f"{first} and {second}")


class StrangeError(ConfigError):
    """An error of the library that cannot be pickled."""

    def __init__(self, lock: Any) -> None:
        super().__init__("strange")
        self.lock = lock
        self.code = "c-1"


class Raising:
    """Work that raises what its input names, after a while."""

    def __init__(self, agent: Any, guide: Any) -> None:
        self.agent, self.guide = agent, guide

    async def __call__(self, task: RolloutTask) -> Rollout:
        kind, delay = task.sample.x
        await asyncio.sleep(delay)
        if kind == "strange":
            raise StrangeError(threading.Lock())
        if kind == "two":
            raise TwoArgumentsError("one", 2)
        if kind == "counts":
            count("guide", Usage(input_tokens=3, cost=0.1))
            raise AggregatorError("counted")
        if kind == "own":
            raise AggregatorError(f"number {task.sample.id}")
        return Rollout(sample_id=task.sample.id, output=kind)
