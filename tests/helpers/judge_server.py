"""A small OpenAI-compatible server that answers by rule, and makes the mistakes that real ones
make."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, list[bytes]], Any]


class JudgeServer:
    """`rule(text, images)`: the answer to the texts of a request, joined by newlines; a dictionary
    is {token: log probability} of the first token. `fault(number)`: of the number-th request, None
    or a kind of `FAULTS`. `seen`: bodies of requests; `keys`: of their authorisation;
    `most_at_once`: requests that were answered at the same time."""

    def __init__(self, rule: Rule, fault: Callable[[int], str | None] = lambda number: None):
        self.rule, self.fault = rule, fault
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0
        self.delay = 0.0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def texts(self) -> list[str]:
        return [text_and_images(body)[0] for body in self.seen]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                    outer.seen.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    fault = outer.fault(len(outer.seen))
                time.sleep(outer.delay)
                # Before the answer: the client may send its next question as soon as it has it.
                with outer._lock:
                    outer._at_once -= 1
                self._answer(body, fault)

            def _answer(self, body: dict[str, Any], fault: str | None) -> None:
                key = self.headers.get("Authorization", "")
                if fault == "slow":
                    time.sleep(1.5)
                if fault == "429":
                    return self._send(429, b'{"error": "slow down"}', {"Retry-After": "0.01"})
                if fault in ("401", "500", "400"):
                    return self._send(int(fault), f'{{"error": "not with {key}"}}'.encode())
                if fault == "redirect":
                    return self._send(302, b"", {"Location": outer.url + "/elsewhere"})
                if fault == "broken":
                    return self._send(200, b'{"choices": [{"mess')
                text, images = text_and_images(body)
                found = "" if fault == "empty" else outer.rule(text, images)
                message = {"role": "assistant", "content": found}
                choice: dict[str, Any] = {"message": message, "finish_reason": "stop"}
                if fault == "refusal":
                    message |= {"content": None, "refusal": "I cannot judge people."}
                if isinstance(found, dict):
                    message["content"] = max(found, key=found.get)
                    top = [{"token": token, "logprob": value} for token, value in found.items()]
                    if fault != "no_logprobs":
                        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
                self._send(200, json.dumps({"choices": [choice]}).encode())

            def _send(
                self, code: int, content: bytes, headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler


def text_and_images(body: dict[str, Any]) -> tuple[str, list[bytes]]:
    """(texts joined by newlines, data of the images) of a request."""
    texts, images = [], []
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            images.append(part["image_url"]["url"].partition(",")[2].encode())
    return "\n".join(texts), images
