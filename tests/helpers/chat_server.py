"""A local server that speaks enough of OpenAI's chat API to judge texts."""

import json
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JSON = "application/json"


@dataclass
class ChatServer:
    """Where the server listens, and the requests and their user messages that it has received."""

    base_url: str
    prompts: list[str] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)


def completion(content, top_probabilities=None):
    """Return a chat completion; top_probabilities: token -> probability of the first token."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    if top_probabilities is not None:
        top = [
            {"token": token, "logprob": math.log(probability), "bytes": None}
            for token, probability in top_probabilities.items()
        ]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    common = {"id": "1", "object": "chat.completion", "created": 0, "model": "local"}
    return {**common, "choices": [choice]}


def error(message, status=400, **fields):
    """Return an error in the form of OpenAI's; fields: such as `param`."""
    return status, JSON, {"error": {"message": message, "type": "invalid_request_error", **fields}}


@contextmanager
def chat_server(answer, reads="prompt"):
    """Serve until the body ends.

    answer: takes the user message (or the whole request, if `reads` is "request"); returns a body, or
        (status, content type, body), perhaps with headers. Bytes and strings are sent as they are.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            server.prompts.append(prompt)
            server.requests.append(request)
            found = answer(request if reads == "request" else prompt)
            status, kind, body, *headers = found if isinstance(found, tuple) else (200, JSON, found)
            text = body if isinstance(body, bytes | str) else json.dumps(body)
            sent = text if isinstance(text, bytes) else text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(sent), **dict(*headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        server = ChatServer(f"http://127.0.0.1:{http_server.server_port}/v1")
        thread = threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http_server.shutdown()
            thread.join()
