"""LlamaIndex: prompts at any depth are parameters, and candidates run on copies of their modules."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("llama_index.core", reason="runs in the environment llama-index of tests/environments.py")

from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata, ToolCallBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.query_engine import CustomQueryEngine, RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode

from aggregator import as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample

pytestmark = pytest.mark.filterwarnings("ignore")
QA = "Context: {context_str} Question: {query_str}"


class Echo(CustomLLM):
    """Answers with its whole prompt."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        return CompletionResponse(text=prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> Any:
        raise NotImplementedError


class Chat(Echo):
    """A chat model that answers with the messages."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def chat(self, messages: Any, **_: Any) -> ChatResponse:
        text = " | ".join(f"{one.role.value}: {one.content}" for one in messages)
        return ChatResponse(message=ChatMessage(role="assistant", content=text))


class Fixed(BaseRetriever):
    def _retrieve(self, query_bundle: Any) -> Any:
        return [NodeWithScore(node=TextNode(text="a lamp"), score=1.0)]


class Nested(CustomQueryEngine):
    """A query engine around another one: its prompts are two levels deep."""

    inner: Any

    def _get_prompt_modules(self) -> Any:
        return {"inner": self.inner}

    def custom_query(self, query_str: str) -> str:
        return str(self.inner.query(query_str))


def engine(llm: Any = None) -> RetrieverQueryEngine:
    synthesizer = get_response_synthesizer(llm=llm or Echo(), text_qa_template=PromptTemplate(QA))
    return RetrieverQueryEngine(Fixed(), response_synthesizer=synthesizer)


async def rollout(agent: Any, x: Any = "why", **values: str) -> Rollout:
    task = RolloutTask(sample=Sample(0, x), values=values, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), None)(task)


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters() if parameter.trainable]


QA_NAME = "response_synthesizer.text_qa_template"


async def test_a_prompt_of_a_query_engine_is_trained_on_copies() -> None:
    """Concurrent candidates each have their own text; the host's engine changes once a value is accepted."""
    host = engine()
    agent = trainable(host, train=[QA_NAME])
    assert names(agent) == [QA_NAME]
    texts = [f"T{i} {QA}" for i in range(16)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, **{QA_NAME: text})) for text in texts]
    assert [task.result().output for task in tasks] == [f"T{i} Context: a lamp Question: why" for i in range(16)]
    assert str(host.query("why")) == "Context: a lamp Question: why"
    agent.apply({QA_NAME: f"New {QA}"})
    assert str(host.query("why")) == "New Context: a lamp Question: why"


async def test_prompts_two_levels_deep_are_trained() -> None:
    """LlamaIndex's own `update_prompts` fails for such keys."""
    name = f"inner.{QA_NAME}"
    agent = trainable(Nested(inner=engine()), train=[name])
    assert (await rollout(agent, **{name: f"Deep {QA}"})).output == "Deep Context: a lamp Question: why"
    agent.apply({name: f"New {QA}"})
    assert (await rollout(agent)).output == "New Context: a lamp Question: why"


async def test_the_models_variant_of_a_prompt_is_trained() -> None:
    """The default QA prompt has one text for completions and a chat for chat models."""
    synthesizer = get_response_synthesizer(llm=Chat())
    host = RetrieverQueryEngine(Fixed(), response_synthesizer=synthesizer)
    agent = trainable(host)
    assert f"{QA_NAME}.system" in names(agent)
    found = await rollout(agent, **{f"{QA_NAME}.system": "Be brief."})
    assert found.output.startswith("system: Be brief. | user: Context information")
    assert "Be brief." not in str(host.query("why"))


def test_messages_of_a_chat_prompt_are_parameters_by_role() -> None:
    chat = ChatPromptTemplate.from_messages([("system", "S"), ("user", "U {query_str} {context_str}"), ("user", "V")])
    synthesizer = get_response_synthesizer(llm=Chat(), text_qa_template=chat)
    found = names(trainable(RetrieverQueryEngine(Fixed(), response_synthesizer=synthesizer)))
    assert [name.removeprefix(f"{QA_NAME}.") for name in found if name.startswith(QA_NAME)] == [
        "system",
        "user",
        "user_2",
    ]


class Tools(FunctionCallingLLM):
    """Calls the first tool once, then answers with its system prompt and the tool's result."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True)

    async def achat_with_tools(self, tools: Any, user_msg: Any = None, chat_history: Any = None, **_: Any) -> Any:
        texts = [f"{one.role.value}: {one.content}" for one in chat_history]
        done = any(one.role.value == "tool" for one in chat_history)
        message = ChatMessage(role="assistant", content=" | ".join(texts))
        if tools and not done:
            arguments = {"to_agent": "refunds", "reason": "money"} if len(tools) > 1 else {"customer": "Ann"}
            tool = tools[-1].metadata.name
            message.blocks.append(ToolCallBlock(tool_call_id="1", tool_name=tool, tool_kwargs=arguments))
        return ChatResponse(message=message)

    def get_tool_calls_from_response(self, response: Any, **_: Any) -> Any:
        from llama_index.core.llms.llm import ToolSelection

        return [
            ToolSelection(tool_id="1", tool_name=one.tool_name, tool_kwargs=one.tool_kwargs)
            for one in response.message.blocks
            if isinstance(one, ToolCallBlock)
        ]

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    chat = complete = stream_chat = stream_complete = _prepare_chat_with_tools = _unused
    achat = acomplete = astream_chat = astream_complete = _unused


def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"a lamp for {customer}"


async def test_an_agent_with_tools_is_trained_by_its_system_prompt() -> None:
    host = FunctionAgent(llm=Tools(), tools=[history], system_prompt="Be kind.", streaming=False)
    agent = trainable(host)
    assert names(agent) == ["system_prompt"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, system_prompt=f"S{i}.")) for i in range(8)]
    for i, task in enumerate(tasks):
        assert task.result().output.startswith(f"system: S{i}. | user: why")
        assert "history" in task.result().transcript
        assert "a lamp for Ann" in task.result().transcript
    assert host.system_prompt == "Be kind."


async def test_agents_of_a_workflow_are_trained_by_name() -> None:
    front = FunctionAgent(
        name="front", description="Routes.", llm=Tools(), system_prompt="Route.", tools=[history], streaming=False
    )
    refunds = FunctionAgent(
        name="refunds", description="Refunds.", llm=Tools(), system_prompt="Refund.", streaming=False
    )
    agent = trainable(AgentWorkflow(agents=[front, refunds], root_agent="front"))
    assert {"front.system_prompt", "refunds.system_prompt", "refunds.description", "handoff_prompt"} <= set(
        names(agent)
    )
    found = await rollout(agent, **{"refunds.system_prompt": "Refund gladly."})
    assert "system: Refund gladly." in found.output
    assert refunds.system_prompt == "Refund."


def test_the_prompt_of_a_react_agent_is_a_parameter_and_copies_do_not_share_it() -> None:
    host = ReActAgent(llm=Echo(), tools=[history])
    agent = trainable(host)
    before = host.formatter.system_header
    assert names(agent) == ["react_header"]
    with agent.applied({"react_header": f"{before}\nBe kind."}) as copied:
        assert copied.formatter.system_header.endswith("Be kind.")
    assert host.formatter.system_header == before


async def test_model_calls_are_shown_if_no_client_is_observed() -> None:
    found = await rollout(trainable(engine()))
    assert found.transcript.count("Context: a lamp Question: why") == 2  # the prompt, and the answer that repeats it


async def test_a_custom_run_function() -> None:
    """A component that is neither a query engine nor an agent is trained with `run=`."""
    synthesizer = get_response_synthesizer(llm=Echo(), text_qa_template=PromptTemplate(QA))
    with pytest.raises(ConfigError, match="Expected a query engine or an agent, got CompactAndRefine"):
        trainable(synthesizer)

    async def run(program: Any, x: Any) -> Any:
        return await program.asynthesize(x, nodes=[NodeWithScore(node=TextNode(text="a lamp"))])

    agent = trainable(synthesizer, run=run)
    found = await rollout(agent, text_qa_template=f"T {QA}")
    assert found.output == "T Context: a lamp Question: why"


def test_agents_without_a_trainable_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="Expected train= to name parameters of response_synthesizer"):
        trainable(engine(), train=["text_qa"])
    with pytest.raises(ConfigError, match="with a text that can be trained, got none"):
        trainable(FunctionAgent(llm=Tools(), tools=[history]))
    memory = ChatMemoryBuffer.from_defaults(tokenizer_fn=str.split)
    with pytest.raises(ConfigError, match="an agent of Trace"):
        trainable(SimpleChatEngine.from_defaults(llm=Echo(), memory=memory))  # it has no get_prompts


class Streams(Echo):
    """A model that streams its prompt, and counts the streams that were read to their end."""

    read: int = 0

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> Any:
        yield CompletionResponse(text=prompt, delta=prompt)
        self.read += 1


async def test_a_streamed_answer_was_read_by_the_guide() -> None:
    """The agent's output was a stream, whose request was made when the guide read it."""
    llm = Streams()
    synthesizer = get_response_synthesizer(llm=llm, text_qa_template=PromptTemplate(QA), streaming=True)
    found = await rollout(trainable(RetrieverQueryEngine(Fixed(), response_synthesizer=synthesizer)))
    assert (found.output, llm.read) == ("Context: a lamp Question: why", 1)
