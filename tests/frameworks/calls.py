"""One call of each SDK, as its users write it: a client of the server's address, and a function that asks it.

Functions import their SDK themselves, as no environment has all of them.
"""

# mypy: disable-error-code="import-not-found,import-untyped,attr-defined"

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.request import ProxyHandler, Request, build_opener

KEY = "sk-proj-Abcdef1234567890abcdef1234567890"
PROMPT = [{"role": "user", "content": "hello"}]


class Call(NamedTuple):
    """`open(url)` returns a client that several calls share, `ask(client, prompt)` makes one call."""

    name: str
    package: str
    clients: str
    open: Callable[[str], Any]
    ask: Callable[[Any, str], Any]
    is_async: bool = False


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def openai_client(url: str) -> Any:
    import openai

    return openai.OpenAI(api_key=KEY, base_url=f"{url}/v1")


def openai_async(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1")


def openai_aiohttp(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1", http_client=openai.DefaultAioHttpClient())


def chat(client: Any, prompt: str) -> Any:
    return client.chat.completions.create(model="m", messages=said(prompt)).choices[0].message.content


async def achat(client: Any, prompt: str) -> Any:
    return (await client.chat.completions.create(model="m", messages=said(prompt))).choices[0].message.content


def chat_stream(client: Any, prompt: str) -> Any:
    stream = client.chat.completions.create(model="m", messages=said(prompt), stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


async def achat_stream(client: Any, prompt: str) -> Any:
    stream = await client.chat.completions.create(model="m", messages=said(prompt), stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def responses(client: Any, prompt: str) -> Any:
    return client.responses.create(model="m", input=prompt).output_text


async def aresponses(client: Any, prompt: str) -> Any:
    return (await client.responses.create(model="m", input=prompt)).output_text


async def aresponses_stream(client: Any, prompt: str) -> Any:
    stream = await client.responses.create(model="m", input=prompt, stream=True)
    return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])


def transcription(client: Any, prompt: str) -> Any:
    return client.audio.transcriptions.create(model="w", file=("a.mp3", prompt.encode() * 50)).text


def embedding(client: Any, prompt: str) -> Any:
    return str(client.embeddings.create(model="m", input=prompt).data[0].embedding)


def anthropic_client(url: str) -> Any:
    import anthropic

    return anthropic.Anthropic(api_key="sk-ant-api03-not-a-real-key-000000", base_url=url)


def anthropic_async(url: str) -> Any:
    import anthropic

    return anthropic.AsyncAnthropic(api_key="sk-ant-api03-not-a-real-key-000000", base_url=url)


def message(client: Any, prompt: str) -> Any:
    return client.messages.create(model="m", max_tokens=9, messages=said(prompt)).content[0].text


async def amessage(client: Any, prompt: str) -> Any:
    return (await client.messages.create(model="m", max_tokens=9, messages=said(prompt))).content[0].text


async def amessage_stream(client: Any, prompt: str) -> Any:
    async with client.messages.stream(model="m", max_tokens=9, messages=said(prompt)) as stream:
        return "".join([text async for text in stream.text_stream])


def genai(url: str) -> Any:
    from google import genai

    return genai.Client(api_key="AIzaNotARealKey_0000000000000000000000", http_options={"base_url": url})


def generate(client: Any, prompt: str) -> Any:
    return client.models.generate_content(model="g", contents=prompt).text


def generate_stream(client: Any, prompt: str) -> Any:
    return "".join(chunk.text for chunk in client.models.generate_content_stream(model="g", contents=prompt))


async def agenerate(client: Any, prompt: str) -> Any:
    return (await client.aio.models.generate_content(model="g", contents=prompt)).text


async def agenerate_stream(client: Any, prompt: str) -> Any:
    stream = await client.aio.models.generate_content_stream(model="g", contents=prompt)
    return "".join([chunk.text async for chunk in stream])


def mistral(url: str) -> Any:
    try:
        from mistralai import Mistral
    except ImportError:
        from mistralai.client import Mistral
    return Mistral(api_key=KEY, server_url=url)


def mistral_chat(client: Any, prompt: str) -> Any:
    return client.chat.complete(model="m", messages=said(prompt)).choices[0].message.content


async def amistral_chat(client: Any, prompt: str) -> Any:
    return (await client.chat.complete_async(model="m", messages=said(prompt))).choices[0].message.content


def cohere(url: str) -> Any:
    import cohere

    return cohere.ClientV2(api_key=KEY, base_url=url)


def cohere_async(url: str) -> Any:
    import cohere

    return cohere.AsyncClientV2(api_key=KEY, base_url=url)


def cohere_chat(client: Any, prompt: str) -> Any:
    return client.chat(model="m", messages=said(prompt)).message.content[0].text


async def acohere_chat(client: Any, prompt: str) -> Any:
    return (await client.chat(model="m", messages=said(prompt))).message.content[0].text


AWS = {
    "region_name": "us-east-1",
    "aws_access_key_id": "AKIANOTAREALKEY00000",
    "aws_secret_access_key": "not-a-real-secret-not-a-real-secret-0000",
}


def bedrock(url: str) -> Any:
    import boto3

    return boto3.session.Session().client("bedrock-runtime", endpoint_url=url, **AWS)


def converse(client: Any, prompt: str) -> Any:
    asked = [{"role": "user", "content": [{"text": prompt}]}]
    return client.converse(modelId="m", messages=asked)["output"]["message"]["content"][0]["text"]


def converse_stream(client: Any, prompt: str) -> Any:
    asked = [{"role": "user", "content": [{"text": prompt}]}]
    events = client.converse_stream(modelId="m", messages=asked)["stream"]
    return "".join(event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event)


async def aconverse(url: str, prompt: str) -> Any:
    from aiobotocore.session import get_session

    asked = [{"role": "user", "content": [{"text": prompt}]}]
    async with get_session().create_client("bedrock-runtime", endpoint_url=url, **AWS) as client:
        reply = await client.converse(modelId="m", messages=asked)
    return reply["output"]["message"]["content"][0]["text"]


def ollama(url: str) -> Any:
    import ollama

    return ollama.Client(host=url)


def ollama_async(url: str) -> Any:
    import ollama

    return ollama.AsyncClient(host=url)


def ollama_chat(client: Any, prompt: str) -> Any:
    return client.chat(model="m", messages=said(prompt)).message.content


async def aollama_chat(client: Any, prompt: str) -> Any:
    return (await client.chat(model="m", messages=said(prompt))).message.content


def hub(url: str) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(base_url=f"{url}/v1", api_key=KEY)


def hub_async(url: str) -> Any:
    from huggingface_hub import AsyncInferenceClient

    return AsyncInferenceClient(base_url=f"{url}/v1", api_key=KEY)


def hub_chat(client: Any, prompt: str) -> Any:
    return client.chat_completion(said(prompt), model="m").choices[0].message.content


async def ahub_chat(client: Any, prompt: str) -> Any:
    return (await client.chat_completion(said(prompt), model="m")).choices[0].message.content


def litellm_chat(url: str, prompt: str) -> Any:
    import litellm

    reply = litellm.completion("openai/m", said(prompt), api_base=f"{url}/v1", api_key=KEY)
    return reply.choices[0].message.content


async def alitellm_chat(url: str, prompt: str) -> Any:
    import litellm

    reply = await litellm.acompletion("openai/m", said(prompt), api_base=f"{url}/v1", api_key=KEY)
    return reply.choices[0].message.content


async def alitellm_anthropic(url: str, prompt: str) -> Any:
    import litellm

    reply = await litellm.acompletion("anthropic/m", said(prompt), api_base=url, api_key=KEY)
    return reply.choices[0].message.content


def langchain(url: str) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="m", base_url=f"{url}/v1", api_key=KEY)


def langchain_invoke(client: Any, prompt: str) -> Any:
    return client.invoke(prompt).content


async def alangchain_invoke(client: Any, prompt: str) -> Any:
    return (await client.ainvoke(prompt)).content


def langchain_batch(client: Any, prompt: str) -> Any:
    return [reply.content for reply in client.batch([prompt] * 8)]


def agent(url: str) -> Any:
    import agents

    agents.set_tracing_disabled(disabled=True)
    model = agents.OpenAIChatCompletionsModel("m", openai_async(url))
    return agents.Agent(name="a", instructions="Answer.", model=model)


async def arun_agent(client: Any, prompt: str) -> Any:
    import agents

    return (await agents.Runner.run(client, prompt)).final_output


def address(url: str) -> str:
    return url


def by_requests(url: str, prompt: str) -> Any:
    import requests

    return requests.post(f"{url}/v1", json={"q": prompt}, timeout=9).json()["text"]


def session(url: str) -> Any:
    import requests

    return url, requests.Session()


def by_session(client: Any, prompt: str) -> Any:
    url, opened = client
    return opened.post(f"{url}/v1", json={"q": prompt}, timeout=9).json()["text"]


def by_urllib3(url: str, prompt: str) -> Any:
    import urllib3

    with urllib3.PoolManager() as pool:
        return json.loads(pool.request("POST", f"{url}/v1", body=json.dumps({"q": prompt})).data)["text"]


def dspy_lm(url: str) -> Any:
    import dspy

    return dspy.LM("openai/m", api_base=f"{url}/v1", api_key=KEY, cache=False)


def dspy_call(lm: Any, prompt: str) -> Any:
    return lm(prompt)[0]


async def adspy_call(lm: Any, prompt: str) -> Any:
    return (await lm.acall(prompt))[0]


def dspy_parallel(lm: Any, prompt: str) -> Any:
    from dspy import Parallel

    return Parallel(num_threads=8, disable_progress_bar=True)([(lambda text: lm(text)[0], {"text": prompt})] * 8)


def by_httplib2(url: str, prompt: str) -> Any:
    import httplib2

    client = httplib2.Http(timeout=9)
    try:
        return json.loads(client.request(f"{url}/v1", "POST", json.dumps({"q": prompt}))[1])["text"]
    finally:
        client.close()


def by_urllib(url: str, prompt: str) -> Any:
    with build_opener(ProxyHandler({})).open(Request(f"{url}/v1", json.dumps({"q": prompt}).encode())) as reply:
        return json.loads(reply.read())["text"]


async def by_tornado(url: str, prompt: str) -> Any:
    from tornado.httpclient import AsyncHTTPClient

    client = AsyncHTTPClient(force_instance=True)
    reply = await client.fetch(f"{url}/v1", method="POST", body=json.dumps({"q": prompt}))
    client.close()
    return json.loads(reply.body)["text"]


async def by_httpx(url: str, prompt: str) -> Any:
    import httpx

    async with httpx.AsyncClient() as client:
        return (await client.post(f"{url}/v1", json={"q": prompt})).json()["text"]


async def by_aiohttp(url: str, prompt: str) -> Any:
    import aiohttp

    async with aiohttp.ClientSession() as client, client.post(f"{url}/v1", json={"q": prompt}) as reply:
        return (await reply.json())["text"]


CALLS = [
    Call("chat", "openai", "openai", openai_client, chat),
    Call("chat, async", "openai", "openai", openai_async, achat, is_async=True),
    Call("chat, stream", "openai", "openai", openai_client, chat_stream),
    Call("chat, async stream", "openai", "openai", openai_async, achat_stream, is_async=True),
    Call("chat, aiohttp transport", "openai", "openai", openai_aiohttp, achat, is_async=True),
    Call("Responses", "openai", "openai", openai_client, responses),
    Call("Responses, async", "openai", "openai", openai_async, aresponses, is_async=True),
    Call("Responses, async stream", "openai", "openai", openai_async, aresponses_stream, is_async=True),
    Call("transcription (upload)", "openai", "openai", openai_client, transcription),
    Call("embedding", "openai", "openai", openai_client, embedding),
    Call("messages", "anthropic", "anthropic", anthropic_client, message),
    Call("messages, async", "anthropic", "anthropic", anthropic_async, amessage, is_async=True),
    Call("messages, async stream", "anthropic", "anthropic", anthropic_async, amessage_stream, is_async=True),
    Call("generate", "google-genai", "google-genai", genai, generate),
    Call("generate, stream", "google-genai", "google-genai", genai, generate_stream),
    Call("generate, async", "google-genai", "google-genai", genai, agenerate, is_async=True),
    Call("generate, async stream", "google-genai", "google-genai", genai, agenerate_stream, is_async=True),
    Call("chat", "mistralai", "mistralai", mistral, mistral_chat),
    Call("chat, async", "mistralai", "mistralai", mistral, amistral_chat, is_async=True),
    Call("chat", "cohere", "cohere", cohere, cohere_chat),
    Call("chat, async", "cohere", "cohere", cohere_async, acohere_chat, is_async=True),
    Call("Bedrock converse", "boto3", "boto3", bedrock, converse),
    Call("Bedrock converse, stream", "boto3", "boto3", bedrock, converse_stream),
    Call("Bedrock converse, async", "aiobotocore", "aiobotocore", address, aconverse, is_async=True),
    Call("chat", "ollama", "ollama", ollama, ollama_chat),
    Call("chat, async", "ollama", "ollama", ollama_async, aollama_chat, is_async=True),
    Call("chat", "huggingface_hub", "huggingface_hub", hub, hub_chat),
    Call("chat, async", "huggingface_hub", "huggingface_hub", hub_async, ahub_chat, is_async=True),
    Call("completion", "litellm", "litellm", address, litellm_chat),
    Call("acompletion", "litellm", "litellm", address, alitellm_chat, is_async=True),
    Call("acompletion, anthropic", "litellm", "litellm", address, alitellm_anthropic, is_async=True),
    Call("invoke", "langchain-openai", "langchain", langchain, langchain_invoke),
    Call("ainvoke", "langchain-openai", "langchain", langchain, alangchain_invoke, is_async=True),
    Call("batch of 8", "langchain-openai", "langchain", langchain, langchain_batch),
    Call("LM", "dspy", "dspy", dspy_lm, dspy_call),
    Call("LM, async", "dspy", "dspy", dspy_lm, adspy_call, is_async=True),
    Call("Parallel of 8", "dspy", "dspy", dspy_lm, dspy_parallel),
    Call("Runner.run", "openai-agents", "openai", agent, arun_agent, is_async=True),
    Call("post", "requests", "requests", address, by_requests),
    Call("one Session", "requests", "requests", session, by_session),
    Call("request", "urllib3", "urllib3", address, by_urllib3),
    Call("request", "httplib2", "httplib2", address, by_httplib2),
    Call("urlopen", "", "http.client", address, by_urllib),
    Call("fetch", "tornado", "tornado", address, by_tornado, is_async=True),
    Call("post, async", "httpx", "httpx", address, by_httpx, is_async=True),
    Call("post", "aiohttp", "aiohttp", address, by_aiohttp, is_async=True),
]


def version_of(call: Call) -> str | None:
    """Return the version of an SDK, or None if it is not installed."""
    if not call.package:
        return "Python's own"
    try:
        return importlib.metadata.version(call.package)
    except importlib.metadata.PackageNotFoundError:
        return None
