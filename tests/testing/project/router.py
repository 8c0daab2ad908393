"""The project's own code: calls a model over httpx, as an SDK does."""

from __future__ import annotations

import os

import httpx


def request(ticket: str) -> dict[str, object]:
    """Return the request for a ticket."""
    return {"model": "small", "messages": [{"role": "user", "content": f"Which team? {ticket}"}]}


def route(ticket: str) -> str:
    """Ask synchronously."""
    with httpx.Client(trust_env=False) as client:
        return client.post(os.environ["MODEL_URL"], json=request(ticket)).text


async def aroute(ticket: str) -> str:
    """Ask in an event loop."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.post(os.environ["MODEL_URL"], json=request(ticket))).text
