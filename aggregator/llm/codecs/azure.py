"""Azure OpenAI: chat completions behind a deployment's path, an api-version and its own key header."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from msgspec.structs import replace

from aggregator.llm.calls import ChatCall, Target
from aggregator.llm.codecs.openai import OpenAIChat


def settle_azure(target: Target, env: Mapping[str, str]) -> Target:
    """Take the api-version from the environment; one in the address itself wins. A token of Entra is no API key."""
    if isinstance(target.api_key, str) and target.api_key.startswith("eyJ"):  # as every JSON web token begins
        target = replace(target, auth="authorization")
    version = env.get("OPENAI_API_VERSION") or env.get("AZURE_API_VERSION")
    return replace(target, options={**target.options, "api_version": version}) if version else target


class AzureChat(OpenAIChat):
    """The codec of Azure OpenAI; the model's name is the deployment's.

    The address may be the resource (`https://NAME.openai.azure.com`), a deployment's path, or a `/models` path of
    Azure AI. Without any api-version the resource's `/openai/v1` API is called, which needs none.
    """

    def url(self, call: ChatCall) -> str:
        """Where this call is posted."""
        address, _, query = self.target.base_url.partition("?")
        address = address.rstrip("/")
        version = self.target.options.get("api_version")
        if not query and version:
            query = f"api-version={quote(str(version))}"
        if address.endswith("/openai/v1"):
            return f"{address}/chat/completions"
        if "/deployments/" not in address and not address.endswith("/models"):
            address = address.removesuffix("/openai")
            if not query:
                return f"{address}/openai/v1/chat/completions"
            address = f"{address}/openai/deployments/{quote(call.model, safe='')}"
        return f"{address}/chat/completions{'?' if query else ''}{query}"
