"""A provider in one file: Cohere's chat API, whole answers and streams.

Copy it into a package of yours, and name `provider` in its pyproject.toml. Then `LLM("cohere/command-a")` works:

    [project.entry-points."aggregator.providers"]
    cohere = "my_package.provider:provider"
"""

from typing import Any

import msgspec
from msgspec import Struct

from aggregator.providers import ChatCall, Event, EventReader, JSONCodec, Provider, words
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, Usage


class Part(Struct, frozen=True):
    text: str = ""


class Text(Struct, frozen=True):
    content: list[Part] = []


class Answer(Struct):  # every field is optional: what does not fit is dropped
    id: str | None = None
    finish_reason: str | None = None
    message: Text = Text()
    usage: dict[str, dict[str, float]] = {}


class CohereStream(EventReader):
    text = ""
    end = Answer()

    def event(self, event: Event) -> str:
        data = msgspec.json.decode(event.data)
        if data["type"] == "message-end":
            self.end = msgspec.convert(data["delta"], Answer)
        delta: str = data["delta"]["message"]["content"]["text"] if data["type"] == "content-delta" else ""
        self.text += delta
        return delta

    def whole(self) -> bool:
        return self.end.finish_reason is not None

    def build(self, reply: HTTPReply) -> Completion:
        return self.codec.completion(msgspec.structs.replace(self.end, message=Text([Part(self.text)])), reply)


class Cohere(JSONCodec[Answer]):
    decoder = msgspec.json.Decoder(Answer)
    reader = CohereStream
    finish_words = words(stop="COMPLETE STOP_SEQUENCE", length="MAX_TOKENS")  # any other word is an error
    lacks = frozenset({"n", "tools", "tool_choice"})

    def encode(self, call: ChatCall) -> HTTPRequest:
        body: dict[str, Any] = {
            "model": call.model, "messages": call.messages, "max_tokens": call.max_tokens, "p": call.top_p,
            "temperature": call.temperature, "seed": call.seed, "response_format": call.response_format,
            "stop_sequences": [call.stop] if isinstance(call.stop, str) else call.stop, "stream": call.stream,
        }  # fmt: skip
        given = {name: value for name, value in body.items() if value is not None}
        return self.post(f"{self.target.base_url}/v2/chat", given | dict(call.extra), call)

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        tokens = {name: int(count) for name, count in answer.usage.get("tokens", {}).items()}
        choice = Choice(
            message=Message(content="".join(part.text for part in answer.message.content)),
            finish_reason=self.finish_reason(answer.finish_reason),
            raw_finish_reason=answer.finish_reason,
        )
        return self.completed(reply, [choice], usage=Usage(**tokens), model=self.target.model, answer_id=answer.id)


provider = Provider(
    name="cohere", codec=Cohere, base_url="https://api.cohere.com", keys={"CO_API_KEY": "authorization"}
)
