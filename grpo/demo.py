"""A small web page that asks a model about a clip: `python -m grpo.demo --model OUT`, or `make demo`.

Upload or record a clip, write a question and its choices; thought, semantic elements and answer are shown apart. The
standard library's server and one HTML file: nothing is fetched from elsewhere, no clip outlives its answer. On
loopback; --host elsewhere wants GRPO_DEMO_TOKEN in the environment, and the page opened with #token=... at the end
of its address.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import json
import os
import secrets
import sys
import tempfile
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from grpo.answer import Listener, arguments, ask, chosen
from grpo.config import ConfigError
from grpo.rollout.serve import LOOPBACK

TOKEN = "GRPO_DEMO_TOKEN"
PAGE = Path(__file__).with_name("demo.html")
WAITING = 4  # questions at once, one of them being answered: the next one is told to come again
POLICY = ("default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
          "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip


class Refused(Exception):
    """A request that is not answered: status and one line for the page."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class Demo(ThreadingHTTPServer):
    """The page's server. `max_bytes` bounds a request's body; `token` is wanted with every question, if there is one.

    Raises ConfigError when another address than loopback is bound without a token.
    """

    daemon_threads = True

    def __init__(self, listener: Listener, *, host: str = "127.0.0.1", port: int = 7860, max_mib: float = 32,
                 token: str | None = None):  # fmt: skip
        if host not in LOOPBACK and not token:
            raise ConfigError(f"--host {host} lets other machines in: set {TOKEN} in the environment as well")
        self.listener, self.token, self.max_bytes = listener, token, int(max_mib * 2**20)
        self.local = host in LOOPBACK
        self.one, self.places = threading.Lock(), threading.Semaphore(WAITING)
        super().__init__((host, port), Handler)
        self.url = f"http://{host}:{self.server_address[1]}"

    def answer(self, asked: dict) -> dict:
        """The record of one question (grpo/answer.py) without paths. Raises Refused."""
        try:
            sound = base64.b64decode(asked["audio"], validate=True)
            question, choices = asked["question"], asked["choices"]
            if not isinstance(question, str) or not isinstance(choices, list) or len(question) > 4000:
                raise ValueError
            if not all(isinstance(c, str) and len(c) <= 1000 for c in choices):
                raise ValueError
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "audio (base64), question and choices (texts) are wanted") from error
        if not self.places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "others are asking: try again in a moment")
        try:
            with self.one, tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "clip"  # never a name that came with it
                path.write_bytes(sound)
                row = next(self.listener.answers([ask(path, question, choices)]))
        except ConfigError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        finally:
            self.places.release()
        problem = row["problem"] and row["problem"].replace(str(path.resolve()), "the clip").replace(
            str(path), "the clip"
        )
        for part in row.get("parts", []):
            part["problem"] = part["problem"] and "not heard"
        return {k: v for k, v in row.items() if k not in ("id", "audio", "start", "end")} | {"problem": problem}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /answer a question."""

    server: Demo
    timeout = 60  # seconds without a byte
    server_version, sys_version = "grpo", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/":
            return self._send(HTTPStatus.NOT_FOUND, {"error": "only / is here"})
        nonce = secrets.token_urlsafe(16)
        body = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        body = body.replace("{{mib}}", str(self.server.max_bytes // 2**20))
        self._send(HTTPStatus.OK, body, {"Content-Security-Policy": POLICY.format(nonce=nonce)})

    def do_POST(self) -> None:
        try:
            if self.path != "/answer":
                raise Refused(HTTPStatus.NOT_FOUND, "only /answer is here")
            self._check_sender()
            self._send(HTTPStatus.OK, self.server.answer(self._body()))
        except Refused as error:
            self.close_connection = True  # its body may not have been read
            self._send(error.status, {"error": str(error)}, {"Connection": "close"})

    def _check_sender(self) -> None:
        """Only our own page: not another site in the user's browser, nor a name that was made to point here."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.local and host.rpartition(":")[0].strip("[]") not in LOOPBACK:
            raise Refused(HTTPStatus.FORBIDDEN, f"asked as {host[:100]}, but this page is for this machine only")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(HTTPStatus.FORBIDDEN, "asked by another site")
        given = self.headers.get("Authorization", "")
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "open the page with #token=... behind its address")

    def _body(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or self.headers.get("Transfer-Encoding"):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is wanted")
        if int(length) > self.server.max_bytes:
            most = self.server.max_bytes * 0.75 / 2**20  # base64 is a third longer than what it carries
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the clip is too large: at most {most:.0f} MiB")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError, OSError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "not JSON") from error
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return body

    def _send(self, status: HTTPStatus, body: str | dict, more: dict | None = None) -> None:
        kind = "text/html; charset=utf-8" if isinstance(body, str) else "application/json"
        data = body.encode() if isinstance(body, str) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        safe = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | safe | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Quiet: questions are nobody's business."""


def main(words: list[str] | None = None) -> int:
    """Run the command until it is interrupted; returns the exit code."""
    parser = argparse.ArgumentParser("python -m grpo.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help=f"another than loopback needs {TOKEN} in the environment")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-mib", type=float, default=32, help="largest question with its clip (default: 32)")
    arguments(parser)
    args = parser.parse_args(words)
    try:
        server = Demo(chosen(args), host=args.host, port=args.port, max_mib=args.max_mib, token=os.environ.get(TOKEN))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"open      {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
