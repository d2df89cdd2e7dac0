"""Waiting for servers: an answer, a token, a process that ends, a time that runs out."""

import contextlib
import http.server
import subprocess
import sys
import threading

from launch.health import wait


@contextlib.contextmanager
def server(token):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.path == "/health" and self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(200 if right else 401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


def test_until_all_answer_to_the_token():
    with server("t") as a, server("t") as b:
        assert wait([a, b], pid=None, seconds=10, token="t") is None
        assert "no answer from" in wait([a, b], pid=None, seconds=0, token="wrong")


def test_not_for_ever_and_not_for_the_dead():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert "ended while starting" in wait(["http://127.0.0.1:1"], pid=ended.pid, seconds=60, token=None)
