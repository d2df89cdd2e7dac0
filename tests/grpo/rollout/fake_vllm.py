"""A stand-in for a vLLM server, standard library only: knows the routes that the client uses, answers at once, and
misbehaves on demand. Its completions depend on seed, prompt and the weights it was sent, so that a wrong one shows.

In-process: `FakeVLLM(prompts)`. As a process: `python fake_vllm.py PORT PROMPTS.json [SECONDS PER ANSWER]`.
"""

import hashlib
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BASE = "base"  # the weights of a server that was sent none


class FakeVLLM:
    """`script` maps a route to a list of misbehaviours, used up one a request: see `misbehave`."""

    def __init__(self, prompts: dict[str, list[int]], *, port=0, stop_id=2, vocabulary=300, seconds=0.0, first=10):
        self.prompts, self.seconds = prompts, seconds
        self.stop_id, self.vocabulary, self.first = stop_id, vocabulary, first
        self.script: dict[str, list[str]] = {}
        self.log: list[tuple[str, dict]] = []
        self.version, self.weights, self.prefix = "default", BASE, None
        self.lock = threading.Lock()
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.serve(self)

            def do_POST(self):
                outer.serve(self)

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            allow_reuse_address = True
            daemon_threads = True

        self.server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, http):
        body = json.loads(http.rfile.read(int(http.headers.get("Content-Length") or 0)) or b"null")
        with self.lock:
            self.log.append((http.path, body))
            faults = self.script.get(http.path) or []
            fault = faults.pop(0) if faults else None
        answer = {"success": True}
        status = 200
        if http.path == "/weight_info":
            answer = {"weight_version": self.version}
        elif http.path == "/update_weight_version":
            self.version = body["new_version"]
        elif http.path == "/reset_prefix_cache":
            self.prefix = None
        elif http.path == "/collective_rpc":
            status, answer = self.rpc(body["method"], body.get("kwargs", {}))
        elif http.path == "/inference/v1/generate":
            time.sleep(self.seconds)
            answer = self.generate(body)
        self.reply(http, status, json.dumps(answer).encode(), fault, answer)

    def rpc(self, method, kwargs):
        if method == "boom":
            return 500, {"error": {"message": "Call to collective_rpc method failed: key 'x' matched nothing"}}
        if method == "bridge_reset":
            self.weights = BASE
        if "path" in kwargs:
            with open(kwargs["path"], "rb") as file:
                self.weights = hashlib.sha256(file.read()).hexdigest()
        elif "data" in kwargs:
            import base64

            self.weights = hashlib.sha256(base64.b64decode(kwargs["data"])).hexdigest()
        return 200, {"results": [{"method": method, "version": kwargs.get("version"), "weights": self.weights}]}

    def generate(self, body):
        """The "prefix cache" keeps the weights of the first answer until it is reset: a forgotten reset shows."""
        self.prefix = self.prefix or self.weights
        s = body["sampling_params"]
        choices = []
        for i in range(s["n"]):
            rng = random.Random(f"{s.get('seed')}/{i}/{body['token_ids']}/{self.prefix}")
            size = rng.randint(1, s["max_tokens"])
            ids = [rng.randrange(self.first, self.vocabulary) for _ in range(size)]
            stopped = size < s["max_tokens"]
            ids[-1] = self.stop_id if stopped else ids[-1]
            if "logprob_token_ids" in s:
                ids = list(s["logprob_token_ids"])
            content = [{"token_id": t, "logprob": -(t % 7) / 7 - 0.1, "top_logprobs": []} for t in ids]
            choices.append({
                "index": i, "finish_reason": "stop" if stopped else "length", "token_ids": ids,
                "logprobs": {"content": content},
                "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
            })  # fmt: skip
        full = self.prompts.get(json.dumps(body["token_ids"]))
        return {"choices": choices, "prompt_token_ids": full}

    def reply(self, http, status, data, fault, answer):
        """`fault`: 500, 503, 400, 401, garbage, list, empty, truncated, reset, hang, few, many, twice, version, nan,
        unbanned, nologprobs, prompt, abort, short."""
        if fault == "hang":
            self.released.wait(60)
            http.close_connection = True
            return
        if fault == "reset":
            http.connection.close()
            http.close_connection = True
            return
        if fault and fault.isdigit():
            status, data = int(fault), b'{"error": {"message": "as scripted"}}'
        elif fault == "garbage":
            data = b"<html>gateway</html>"
        elif fault == "list":
            data = b"[1, 2]"
        elif fault == "empty":
            data = b""
        elif fault in CHANGES:
            CHANGES[fault](answer)
            data = json.dumps(answer).encode()
        http.send_response(status)
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        if fault == "truncated":
            http.wfile.write(data[: len(data) // 2])
            http.wfile.flush()
            http.connection.shutdown(1)
            http.close_connection = True
            return
        http.wfile.write(data)


def change(action):
    return lambda answer: action(answer["choices"], answer)


CHANGES = {
    "few": change(lambda c, a: c.pop()),
    "many": change(lambda c, a: c.append(c[0])),
    "twice": change(lambda c, a: c[-1].update(index=0)),
    "version": change(lambda c, a: c[0]["weight_versions"][0].update(version="other/3")),
    "noversion": change(lambda c, a: c[0].update(weight_versions=None)),
    "nan": change(lambda c, a: c[0]["logprobs"]["content"][0].update(logprob=float("nan"))),
    "swapped": change(lambda c, a: c[0]["logprobs"]["content"][0].update(token_id=-5)),
    "nologprobs": change(lambda c, a: c[0].update(logprobs=None)),
    "notokens": change(lambda c, a: c[0].update(token_ids=[], logprobs={"content": []})),
    "abort": change(lambda c, a: c[0].update(finish_reason="abort")),
    "nochoices": change(lambda c, a: a.pop("choices")),
    "prompt": change(lambda c, a: a.update(prompt_token_ids=a["prompt_token_ids"][:-1])),
}


if __name__ == "__main__":
    port, prompts, *rest = sys.argv[1:]
    with open(prompts) as file:
        made = json.load(file)
    fake = FakeVLLM(made["prompts"], port=int(port), seconds=float(rest[0]) if rest else 0.0, **made["ids"])
    print("fake server", os.getpid(), "ready", flush=True)
    threading.Event().wait()
