"""Where an OpenAI-compatible server is, and who asks it."""

from __future__ import annotations

import os
from typing import Any

from detgpt.errors import InputError


def address(base_url: str | None) -> str:
    """The address to ask: `base_url`, or OPENAI_BASE_URL. Raises `InputError` for none, or what is none."""
    named = base_url or os.environ.get("OPENAI_BASE_URL")
    if not named:
        raise InputError("no server is named: give base_url, such as http://localhost:8000/v1, or set OPENAI_BASE_URL")
    if not named.startswith(("http://", "https://")):
        raise InputError(f"base_url must start with http:// or https://, not {named!r}")
    return named


def credentials(base_url: str, api_key: str | None) -> dict[str, Any]:
    """The client's arguments that say who asks, so that the environment's secrets go to the environment's server."""
    import openai

    environments_own = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if base_url.rstrip("/") == environments_own.rstrip("/"):
        return {"api_key": api_key or os.environ.get("OPENAI_API_KEY") or "none"}
    key = api_key or "none"
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    names = ["OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in lines)]
    headers: dict[str, Any] = {name: openai.Omit() for name in names if name.lower() != "authorization"}
    return {"api_key": key, "default_headers": {**headers, "Authorization": f"Bearer {key}"}}
