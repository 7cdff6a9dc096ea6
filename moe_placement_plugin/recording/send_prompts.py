"""Send a prompt file to a running server over the OpenAI API, by the standard library alone."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import PlacementError
from ..formats.atomic import read_bytes
from ..formats.load_file import read_load


@dataclass(frozen=True)
class Sent:
    """Count what was sent and came back.

    Attributes:
        requests: number of requests.
        prompt_tokens: as the server counts them.
        generated_tokens: likewise.
        seconds: from the first request to the last answer.
        ended: Unix time of the last answer.
    """

    requests: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    ended: float


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read request bodies from a file of lines: plain, or JSON with ``prompt`` or ``messages``.

    Raises:
        PlacementError: when the file is missing, holds nothing, or a JSON line has neither.
    """
    try:
        lines = [line for line in read_bytes(path, "prompt").decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise PlacementError(f"{path} is not text: give a file with a prompt per line") from None
    if not lines:
        raise PlacementError(f"{path} holds no prompt: give a file with a prompt per line")
    bodies = []
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("{"):
            bodies.append({"prompt": line})
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise PlacementError(f"{path}, line {number} is not JSON ({error}): mend it") from None
        key = next((k for k in ("messages", "prompt") if k in data), None)
        if key is None:
            raise PlacementError(
                f'{path}, line {number} has neither "prompt" nor "messages": give one of them'
            )
        bodies.append({key: data[key]})
    return bodies


def send(
    url: str,
    bodies: Sequence[dict[str, Any]],
    model: str | None,
    max_tokens: int,
    concurrency: int,
    timeout: float,
) -> Sent:
    """Send all requests and wait for their answers.

    Args:
        url: of the server, with or without ``/v1``.
        bodies: as `read_prompts` gives them.
        model: its name; None for the first that the server lists.
        max_tokens: to generate for each request.
        concurrency: requests under way at a time.
        timeout: seconds to wait for an answer.

    Raises:
        PlacementError: when the server cannot be reached or refuses a request.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if model is None:
        try:
            model = _call(f"{base}/v1/models", None, timeout)["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise PlacementError(f"{base}/v1/models lists no model: give --model") from None

    def one(body: dict[str, Any]) -> dict[str, Any]:
        path = "chat/completions" if "messages" in body else "completions"
        answer = _call(
            f"{base}/v1/{path}",
            {**body, "model": model, "max_tokens": max_tokens, "temperature": 0},
            timeout,
        )
        return answer.get("usage") or {}

    began = time.time()
    with ThreadPoolExecutor(concurrency) as pool:
        usages = list(pool.map(one, bodies))
    ended = time.time()
    prompt, generated = (
        sum(int(u.get(k) or 0) for u in usages) for k in ("prompt_tokens", "completion_tokens")
    )
    return Sent(len(bodies), prompt, generated, ended - began, ended)


def _call(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        reason = error.read(300).decode(errors="replace").replace("\n", " ")
        raise PlacementError(f"{url} answered {error.code}: {reason}") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise PlacementError(
            f"{url} cannot be reached ({cause}): start the server, or mend --url"
        ) from None


def wait_for_recording(path: Path, before: float, ended: float) -> None:
    """Wait until the recording holds what was answered by ``ended``.

    The server writes once an interval, and only when there is something new: a write after
    ``ended`` holds everything, and so does the last one when another interval has passed without.

    Args:
        path: the recording.
        before: its modification time before the first request, 0 when it did not exist.
        ended: Unix time of the last answer.

    Raises:
        PlacementError: when nothing was written.
    """
    slack = 5.0
    interval = 60.0  # until the recording says which
    while True:
        now = time.time()
        written = path.stat().st_mtime if path.exists() else 0.0
        if written > before:
            interval = float(read_load(path).metadata.get("interval") or interval)
            if written > ended or now > ended + interval + slack:
                return
        elif now > ended + interval + slack:
            raise PlacementError(
                f"the server wrote nothing to {path} in {interval + slack:.0f} s: start it with "
                f"--expert-load-record {path}, and run this command where that file can be read"
            )
        time.sleep(0.2)
