"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a vendor)."""

import base64
import io
import json
import math
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from uno_ds.evaluation.benchmark import Picture
from uno_ds.files_on_disk import read_regular
from uno_ds.settings import SettingsError, printable

# Where the endpoint's key is read from; it is never written anywhere.
KEY_VARIABLES = ("UNO_DS_JUDGE_KEY", "OPENAI_API_KEY")
TOP_LOGPROBS = 20
LARGEST_ANSWER = 10_000_000
ENDPOINT = "/chat/completions"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
# The same request would be refused again.
FATAL = {401: "refuses the key", 403: "forbids the request", 404: "does not know the path or model"}
SECRET = re.compile("key|secret|authorization|password", re.IGNORECASE)
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
MEDIA = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True)
class Question:
    """One call. `key`: unique within the benchmark; `parts`: texts and images in their order;
    `read`: the value of an answer, which raises ValueError if it has none."""

    key: str
    parts: tuple[str | Picture, ...]
    read: Callable[["Reply"], Any]
    max_tokens: int = 1400
    logprobs: bool = False


@dataclass(frozen=True)
class Reply:
    """What a judge answered. `tokens`: {first token: its probability} where they were asked for."""

    text: str
    tokens: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {"text": self.text} | ({"tokens": dict(self.tokens)} if self.tokens else {})


class Unanswered(Exception):
    """A question has no usable answer. `cause`: timeout, unreachable, rate_limit, server_error,
    broken_answer, refused, unparsable, no_logprobs or rejected. `again`: whether asking again may
    help; `pause`: for how many seconds the endpoint asks to wait; `answer`: what the judge wrote,
    where that cannot be used."""

    def __init__(
        self,
        cause: str,
        message: str,
        again: bool = True,
        pause: float | None = None,
        answer: str = "",
    ):
        super().__init__(message)
        self.cause, self.again, self.pause, self.answer = cause, again, pause, answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


class Judge:
    """Asks one model; any number of threads may call `ask` at once. `fields`: more fields of every
    request, None removes one. `shows_key`: the key goes over a network unencrypted. Raises
    SettingsError for a URL that is none."""

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = 120.0,
        retries: int = 5,
        fields: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.host = _host_of(url)
        base = url.rstrip("/").removesuffix(ENDPOINT)
        self.url, self.model = base + ENDPOINT, model
        self.timeout, self.retries, self.fields = timeout, retries, dict(fields or {})
        self._key = _key_of(os.environ if environment is None else environment)
        self._opener = urllib.request.build_opener(*_handlers(self.host))
        self.shows_key = bool(self._key) and url.startswith("http:") and not _is_local(self.host)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Lets no question be asked again."""
        self._stopped.set()

    def description(self) -> dict[str, Any]:
        """What decides the answers, for a result: no path, user or key of the URL."""
        return {
            "kind": "judge",
            "name": self.model,
            "endpoint": self.host,
            "fields": self.fields,
        }

    def ask(self, question: Question) -> tuple[Reply, Any]:
        """(the reply, its value). A failed attempt is repeated after a pause that grows. Raises
        Unanswered when attempts are used up, and SettingsError if the endpoint refuses all."""
        body = self.body(question)
        attempt = 0
        while True:
            try:
                reply = self._post(body, question)
                return reply, _read(question, reply)
            except Unanswered as error:
                attempt += 1
                if not error.again or attempt > self.retries or self._stopped.is_set():
                    raise
                self._stopped.wait(_pause(attempt, error.pause))

    def body(self, question: Question) -> bytes:
        """The request. An image is encoded only here, so that memory holds those in flight."""
        content = [_part(part) for part in question.parts]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": 0,
        }
        if question.logprobs:
            fields |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        fields |= self.fields
        return json.dumps(
            {name: value for name, value in fields.items() if value is not None}
        ).encode()

    def _post(self, body: bytes, question: Question) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                text = response.read(LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from None
        except TimeoutError:
            raise Unanswered("timeout", f"no answer in {self.timeout:g} s") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Unanswered("timeout", f"no answer in {self.timeout:g} s") from None
            raise Unanswered("unreachable", self._clean(reason)) from None
        return _reply(text, question)

    def _of_status(self, error: urllib.error.HTTPError) -> Unanswered | SettingsError:
        code = error.code
        try:
            detail = self._clean(error.read(2000).decode(errors="replace"))
        except (OSError, HTTPException):
            detail = ""
        message = f"status {code}: {detail}"
        if code in FATAL or 300 <= code < 400:
            what = FATAL.get(code, "redirects, which is not followed")
            return SettingsError("--judge", f"{self.host} {what} (status {code}): {detail}")
        if code == 429:
            return Unanswered("rate_limit", message, pause=_seconds(error.headers))
        if code in (408, 409, 425) or code >= 500:
            return Unanswered("server_error", message, pause=_seconds(error.headers))
        return Unanswered("rejected", message, again=False)

    def _clean(self, text: object) -> str:
        """One line without the key, which endpoints repeat in their messages."""
        line = str(text)
        if self._key:
            line = line.replace(self._key, "***")
        return printable(line, 300)


def check_fields(text: str | None) -> dict[str, Any]:
    """--judge-options as a mapping. Raises SettingsError."""
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise SettingsError("--judge-options", f"is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise SettingsError("--judge-options", "must be a JSON object.")
    if any(SECRET.search(name) for name in fields):
        names = " or ".join(KEY_VARIABLES)
        raise SettingsError("--judge-options", f"must hold no key; set {names} instead.")
    return fields


def _key_of(environment: Mapping[str, str]) -> str:
    """The key, empty if there is none. Raises SettingsError, without it, for one that no header can
    hold."""
    for name in KEY_VARIABLES:
        key = environment.get(name, "").strip()
        if not key.isascii() or not key.isprintable():
            raise SettingsError(
                name, "the environment variable holds more than a key's characters."
            )
        if key:
            return key
    return ""


def _handlers(host: str) -> list[urllib.request.BaseHandler]:
    """A server on this machine is reached without the proxies of the environment."""
    direct = [urllib.request.ProxyHandler({})] if _is_local(host) else []
    return [_NoRedirect(), *direct]


def _is_local(host: str) -> bool:
    return host.rpartition(":")[0] in LOCAL_HOSTS or host in LOCAL_HOSTS


def _host_of(url: str) -> str:
    """The host of an endpoint. Raises SettingsError."""
    example = "give it as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError("--judge", f"is not a URL ({error}); {example}.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise SettingsError("--judge", f"'{printable(parts.path, 80)}' is not a URL; {example}.")
    if parts.username or parts.password or parts.query:
        names = " or ".join(KEY_VARIABLES)
        raise SettingsError("--judge", f"must hold no key; set {names} in the environment.")
    return f"{host}:{port}" if port else host


def _part(part: str | Picture) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    content, media = _encoded(part)
    data = base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{media};base64,{data}"}}


def _encoded(picture: Picture) -> tuple[bytes, str]:
    """(bytes, format) of an image file as it is, or of a quarter of it as PNG."""
    try:
        content = read_regular(picture.path)
    except OSError as error:
        message = f"{picture.path} cannot be read: {error.strerror or error}."
        raise SettingsError("--images", message) from None
    if picture.quarter is None:
        return content, MEDIA.get(picture.path.suffix.lower(), "png")
    try:
        image: Image.Image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError("--images", f"{picture.path} is not an image: {error}.") from None
    width, height = image.width // 2, image.height // 2
    left, top = picture.quarter % 2 * width, picture.quarter // 2 * height
    buffer = io.BytesIO()
    image.crop((left, top, left + width, top + height)).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _reply(text: bytes, question: Question) -> Reply:
    """Raises Unanswered."""
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unanswered("broken_answer", "the answer is not a chat completion") from None
    if isinstance(content, list):
        pieces = [part.get("text") or "" for part in content if isinstance(part, dict)]
        content = "".join(pieces)
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise Unanswered("refused", printable(message.get("refusal") or "filtered", 200))
    if question.logprobs:
        return Reply(str(content or ""), _tokens(choice))
    if not isinstance(content, str) or not content.strip():
        raise Unanswered("refused", "the answer is empty")
    return Reply(content)


def _tokens(choice: Mapping[str, Any]) -> dict[str, float]:
    """{token: probability} of the candidates of the first token. Raises Unanswered."""
    found: dict[str, float] = {}
    try:
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            token, logprob = str(entry["token"]), float(entry["logprob"])
            found[token] = found.get(token, 0.0) + math.exp(logprob)
    except (LookupError, TypeError, ValueError, OverflowError):
        found = {}
    if not found:
        raise Unanswered("no_logprobs", "the endpoint returns no top_logprobs")
    return found


def _read(question: Question, reply: Reply) -> Any:
    try:
        return question.read(reply)
    except ValueError as error:
        message = f"{error}: {printable(reply.text, 200)}"
        raise Unanswered("unparsable", message, answer=reply.text) from None


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before attempt `attempt` + 1; of its own length for each thread."""
    if asked is not None:
        return min(asked, LONGEST_PAUSE)
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.0)


def _seconds(headers: Message) -> float | None:
    """Retry-After in seconds; None if it is not given so."""
    try:
        seconds = float(headers.get("Retry-After") or "")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
