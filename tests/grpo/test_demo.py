"""The page's server: what it refuses, what it leaves behind, and the page itself in a headless Chromium."""

import base64
import http.client
import io
import json
import threading
import time

import pytest
import soundfile

from data.audio import load
from grpo.answer import record
from grpo.config import ConfigError
from grpo.demo import Demo
from grpo.predict import read
from tests.conftest import make_clip
from tests.grpo.report import chromium

TEXT = "<think>a <b>bark</b></think><semantic_elements>dog, near</semantic_elements><answer>B. dog</answer>"


class Listener:
    """Reads the clip as the real one does, and always answers the same; remembers where the clips lay."""

    def __init__(self):
        self.seen, self.gate = [], None

    def answers(self, questions):
        for q in questions:
            self.seen.append((q.audio, round(load(q.audio).seconds, 2) if q.question != "broken" else None))
            if self.gate:
                self.gate.wait(20)
            yield record(q, [read(q, TEXT, tokens=5)]) | {"model": "fake", "prompt_hash": "0" * 12}


@pytest.fixture
def serving():
    made = []

    def start(**changes):
        demo = Demo(Listener(), port=0, **changes)
        made.append((demo, threading.Thread(target=demo.serve_forever, daemon=True)))
        made[-1][1].start()
        return demo

    yield start
    for demo, thread in made:
        demo.shutdown(), demo.server_close()
        thread.join(10)


def wav(seconds=0.5):
    clip, out = make_clip(0, seconds), io.BytesIO()
    soundfile.write(out, clip.samples, clip.hz, format="WAV")
    return out.getvalue()


def post(demo, body, path="/answer", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", demo.server_address[1], timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def question(**changes):
    return {"audio": base64.b64encode(wav()).decode(), "question": "What?", "choices": ["cat", "dog"]} | changes


def test_an_answer_in_three_parts_and_no_clip_left(serving):
    demo = serving()
    status, row = post(demo, question())
    assert status == 200 and (row["think"], row["semantic_elements"]) == ("a <b>bark</b>", "dog, near")
    assert (row["option"], row["letter"], row["problem"]) == ("dog", "B", None)
    assert not {"id", "audio"} & row.keys()
    ((path, seconds),) = demo.listener.seen
    assert seconds == 0.5 and not path.exists() and not path.parent.exists()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"no json", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (question(audio="%%%"), {}, 400),
        (question(choices="dog"), {}, 400),
        (question(choices=["dog"]), {}, 400),
        (question(choices=["dog", "Dog"]), {}, 400),
        (question(question="<|AUDIO|>"), {}, 400),
        (question(), {"Host": "evil.example"}, 403),
        (question(), {"Origin": "http://evil.example"}, 403),
        (question(), {"Content-Length": str(10**12)}, 413),
        (question(), {"Content-Length": "-1"}, 411),
        (question(), {"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_what_is_refused(serving, body, headers, status):
    demo = serving()
    said, row = post(demo, body, **headers)
    assert said == status and row["error"] and demo.listener.seen == []
    assert post(demo, question())[0] == 200  # and it lives on


def test_other_paths_are_not_there(serving):
    demo = serving()
    assert post(demo, question(), path="/../grpo/demo.py")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", demo.server_address[1])
    connection.request("GET", "/etc/passwd")
    assert connection.getresponse().status == 404


def test_a_token_guards_what_is_open_to_others(serving):
    with pytest.raises(ConfigError, match="GRPO_DEMO_TOKEN"):
        Demo(Listener(), host="0.0.0.0", port=0)
    demo = serving(token="secret")
    assert post(demo, question())[0] == post(demo, question(), Authorization="Bearer wrong")[0] == 401
    assert post(demo, question(), Authorization="Bearer secret")[0] == 200


def test_more_than_a_few_at_once_are_told_to_wait(serving):
    demo = serving()
    demo.listener.gate = threading.Event()
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(post(demo, question())[0])) for _ in range(4)]
    for t in threads:
        t.start()
    while demo.places._value:  # until all places are taken
        time.sleep(0.01)
    assert post(demo, question())[0] == 503
    demo.listener.gate.set()
    for t in threads:
        t.join(20)
    assert replies == [200] * 4


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="no Chromium here (variable CHROMIUM names one)")
def test_the_page_uploads_records_and_shows_three_parts(serving, tmp_path):
    demo = serving()
    (tmp_path / "clip.wav").write_bytes(wav(0.7))
    page = chromium.Page(
        chromium.find(), tmp_path, flags=("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    )
    try:
        page.visit(demo.url + "/")
        page.click("#ask")
        page.until("document.getElementById('status').textContent.includes('first')")
        node = page.call("DOM.getDocument")["root"]["nodeId"]
        file = page.call("DOM.querySelector", nodeId=node, selector="#file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "clip.wav")])
        page.until("!document.getElementById('player').hidden")
        page.js("document.getElementById('choices').value = 'cat\\ndog\\n'")
        page.click("#ask")
        page.until("!document.getElementById('result').hidden")
        ids = ("think", "elements", "answer", "option")
        shown = [page.js(f"document.querySelector('#{i} p').textContent") for i in ids]
        assert shown == ["a <b>bark</b>", "dog, near", "B. dog", "B. dog"]  # as text: nothing of a model is markup
        assert demo.listener.seen[0][1] == 0.7

        page.click("#record")
        page.until("document.getElementById('record').textContent === 'Stop'")
        page.js("new Promise(done => setTimeout(done, 800))")
        page.click("#record")
        page.until("document.getElementById('record').textContent === 'Record' && clip.type === 'audio/wav'")
        page.click("#ask")
        page.until("!document.getElementById('result').hidden && !document.getElementById('ask').disabled")
        assert len(demo.listener.seen) == 2 and demo.listener.seen[1][1] > 0.3
        assert page.errors == []
        assert all(r.startswith((demo.url, "blob:", "data:", "about:")) for r in page.requests)
    finally:
        page.close()
