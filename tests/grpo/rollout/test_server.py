"""The client of vLLM servers against a scripted stand-in: every fault a server may show, and what becomes of it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from grpo.rollout import Sampling
from grpo.rollout import serve as serve_module
from grpo.rollout.serve import ServerError
from grpo.rollout.server import RolloutError, VLLMServer, gpus_of_each
from tests.conftest import make_clip, make_question
from tests.grpo.rollout.fake_vllm import FakeVLLM

GENERATE = "/inference/v1/generate"
SAMPLING = Sampling(max_tokens=6, seed=3, step=5)
# Everything that may pass, as the stand-in's script calls it.
PASSING = ("500", "503", "429", "garbage", "list", "empty", "truncated", "reset", "few", "many", "twice", "version",
           "noversion", "nan", "swapped", "nologprobs", "notokens", "abort", "nochoices")  # fmt: skip


@pytest.fixture
def prompts(policy):
    return [policy.encode(make_question(f"q{i}"), make_clip(i, 0.3 + 0.1 * i)) for i in range(5)]


def short(policy, prompt) -> list[int]:
    """Prompt ids with one audio placeholder."""
    audio, ids = policy.thinker.config.audio_token_id, prompt.prompt_ids.tolist()
    return [t for i, t in enumerate(ids) if t != audio or ids[i - 1] != audio]


def known(policy, prompts) -> dict:
    """What the stand-in has to know: how each prompt expands, and ids that are not banned."""
    return {
        "prompts": {json.dumps(short(policy, p)): p.prompt_ids.tolist() for p in prompts},
        "ids": {"stop_id": policy.stop_ids[0], "vocabulary": min([*policy.banned_ids, *policy.stop_ids])},
    }


@pytest.fixture
def fakes(policy, prompts):
    made = known(policy, prompts)
    servers = [FakeVLLM(made["prompts"], **made["ids"]) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def engine(policy, fakes):
    engines = []

    def make(n=1, **changes):
        options = {"start": False, "urls": [f.url for f in fakes[:n]], "backoff": 0.01, "timeout": 20.0} | changes
        engines.append(VLLMServer(policy, **options))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def ids(groups):
    return [[c.token_ids for c in g.completions] for g in groups]


def asked(fake):
    return [body for path, body in fake.log if path == GENERATE]


# ---------------------------------------------------------------- what is asked, and what becomes of the answer


def test_a_question_is_one_request_with_one_placeholder_its_own_seed_and_the_ban(policy, prompts, fakes, engine):
    groups = engine().generate(prompts, 3, SAMPLING)
    assert [g.prompt for g in groups] == prompts and all(len(g.completions) == 3 for g in groups)
    requests = asked(fakes[0])
    assert len(requests) == len(prompts)
    assert {json.dumps(r["token_ids"]) for r in requests} == {json.dumps(short(policy, p)) for p in prompts}
    assert len({r["sampling_params"]["seed"] for r in requests}) == len(prompts)
    for request in requests:
        s = request["sampling_params"]
        assert 0 <= s["seed"] < 2**62 and s["n"] == 3  # vLLM adds the copy's number to the seed
        assert (s["top_p"], s["top_k"], s["min_p"], s["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        assert {int(i) for i in s["logit_bias"]} == set(policy.banned_ids)
        assert s["stop_token_ids"] == policy.stop_ids
    for c in (c for g in groups for c in g.completions):
        assert c.version == 0 and c.truncated == (c.token_ids[-1] not in policy.stop_ids)
        assert len(c.sampler_logp) == len(c.token_ids) and c.text == policy.decode(c.token_ids)


def test_the_audio_that_is_sent_is_the_waveform_bit_for_bit(policy, prompts, fakes, engine):
    import base64
    import io

    import numpy as np
    import soundfile

    engine().generate(prompts, 1, SAMPLING)
    sent = {json.dumps(r["token_ids"]): r["content_parts"][0]["url"] for r in asked(fakes[0])}
    for prompt in prompts:
        data = base64.b64decode(sent[json.dumps(short(policy, prompt))].split(",")[1])
        samples, hz = soundfile.read(io.BytesIO(data), dtype="float32")
        assert hz == 16000 and np.array_equal(samples, prompt.samples)


def test_same_name_same_completions_on_any_number_of_servers(prompts, engine):
    one = ids(engine(1).generate(prompts, 3, SAMPLING))
    assert one == ids(engine(2).generate(prompts, 3, SAMPLING))
    assert one == ids(engine(1).generate(prompts[::-1], 3, SAMPLING))[::-1]
    assert one != ids(engine(1).generate(prompts, 3, Sampling(6, 3, 6)))


def test_urls_share_the_questions(prompts, fakes, engine):
    engine(2).generate(prompts, 2, SAMPLING)
    counts = [len(asked(fake)) for fake in fakes]
    assert sum(counts) == len(prompts) and min(counts) == len(prompts) // 2


# ---------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("servers", [1, 2])
def test_a_fault_that_passes_changes_nothing(fault, servers, prompts, fakes, engine):
    undisturbed = ids(engine(1).generate(prompts, 3, SAMPLING))
    before = len(asked(fakes[0]))
    fakes[0].script[GENERATE] = [fault, fault]
    # Asked again once all have been asked: else a second attempt may take the second fault.
    disturbed = engine(servers, backoff=0.2).generate(prompts, 3, SAMPLING)
    assert ids(disturbed) == undisturbed
    assert all(len(g.completions) == 3 for g in disturbed)
    # exactly the missing questions are asked again
    assert sum(len(asked(f)) for f in fakes) - before == len(prompts) + 2


def test_a_hanging_server_given_by_url_is_left_out_and_the_other_does_its_work(prompts, fakes, engine):
    undisturbed = ids(engine(1).generate(prompts, 2, SAMPLING))
    fakes[0].script[GENERATE] = ["hang"] * 3
    both = engine(2, timeout=3.0)
    assert ids(both.generate(prompts, 2, SAMPLING)) == undisturbed
    assert not both.servers[0].up
    fakes[0].released.set()  # well again: it is asked again, once it was brought to the current version
    assert ids(both.generate(prompts, 2, SAMPLING)) == undisturbed
    assert both.servers[0].up


def test_random_faults_in_random_places(prompts, fakes, engine):
    undisturbed = ids(engine(1).generate(prompts, 2, SAMPLING))
    rng = random.Random(0)
    both = engine(2, tries=6, backoff=0.001)
    for _ in range(25):
        for fake in fakes:
            faults = [rng.choice([*PASSING, "", ""]) for _ in range(rng.randint(0, 2))]
            fake.script = {GENERATE: faults, "/weight_info": rng.choice([[], ["503"], ["garbage"]])}
        assert ids(both.generate(prompts, 2, SAMPLING)) == undisturbed


# ---------------------------------------------------------------- faults that do not


@pytest.mark.parametrize("fault", [*PASSING, "hang"])
def test_after_its_tries_the_engine_says_what_it_saw(fault, prompts, fakes, engine):
    fakes[0].script[GENERATE] = [fault] * 100
    one = engine(tries=2, timeout=20.0)
    if fault == "hang":
        one.timeout = one.servers[0].timeout = 0.3
    with pytest.raises(RolloutError, match=r"question q\d: no answer after 2 tries \(rollout.tries\)") as error:
        one.generate(prompts, 2, SAMPLING)
    assert fakes[0].url in str(error.value)


@pytest.mark.parametrize(("fault", "says"), [
    ("400", "answered 400: as scripted"), ("401", "is GRPO_SERVER_TOKEN"), ("403", "is GRPO_SERVER_TOKEN"),
    ("404", "no such route"), ("prompt", r"question q\d: the rollout engine read another prompt"),
])  # fmt: skip
def test_what_repeating_cannot_mend_is_said_at_once(fault, says, prompts, fakes, engine):
    fakes[0].script[GENERATE] = [fault]
    with pytest.raises(RolloutError, match=says):
        engine().generate(prompts[:1], 2, SAMPLING)
    assert len(asked(fakes[0])) == 1


def test_a_server_that_ends_answers_early_is_too_short(prompts, fakes, engine):
    fakes[0].stop_id = fakes[0].first  # never stops by a stop id: ends short of the limit
    with pytest.raises(RolloutError, match=r"rollout.max_model_len"):
        engine().generate(prompts, 4, SAMPLING)


def test_no_server_at_all(policy):
    with pytest.raises(ServerError, match="no server answers at http"):
        VLLMServer(policy, start=False, urls=["http://127.0.0.1:9"])
    with pytest.raises(ServerError, match="give either"):
        VLLMServer(policy, start=False)
    with pytest.raises(ServerError, match="give either"):
        VLLMServer(policy, start=True, urls=["http://127.0.0.1:9"])


# ---------------------------------------------------------------- weights


def push(engine, version, audio_changed=False):
    engine.call("begin", version=version)
    results = engine.send("load", {"w": torch.full((3,), float(version))}, version=version)
    engine.refresh(version, audio_changed=audio_changed)
    return results


def test_a_push_reaches_every_server_and_names_the_version(prompts, fakes, engine):
    both = engine(2)
    old = ids(both.generate(prompts, 2, SAMPLING))
    fakes[0].log.clear()
    results = push(both, 1)
    assert [r["version"] for r in results] == [1, 1] and len({r["weights"] for r in results}) == 1
    groups = both.generate(prompts, 2, SAMPLING)
    assert ids(groups) != old and {c.version for g in groups for c in g.completions} == {1}
    assert len({f.version for f in fakes}) == 1
    paths = [path for path, _ in fakes[0].log]
    # first a name that no answer may bear, so that one which spans the change is refused; the version's own at the end
    named = [body["new_version"] for path, body in fakes[0].log if path == "/update_weight_version"]
    assert named == [f"{both.run}/changing", f"{both.run}/1"]
    assert paths[:4] == ["/collective_rpc", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache"]
    assert "/reset_encoder_cache" not in paths
    push(both, 2, audio_changed=True)
    assert {"/reset_encoder_cache", "/reset_mm_cache"} <= {path for path, _ in fakes[0].log}


def test_only_the_current_pushes_files_are_kept(engine):
    one = engine()
    for version in range(1, 6):
        push(one, version)
    assert len(list(one.exchange.glob("**/*.safetensors"))) == 1
    folder = one.exchange
    one.close()
    assert not folder.exists()


@pytest.mark.parametrize("route", ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "truncated"])
def test_a_push_that_meets_a_fault_arrives_all_the_same(route, fault, prompts, fakes, engine):
    both = engine(2)
    push(both, 1)
    expected = ids(both.generate(prompts, 2, SAMPLING))
    again = engine(2)
    fakes[1].script[route] = [fault]
    push(again, 1)
    assert ids(again.generate(prompts, 2, SAMPLING)) == expected


def test_a_server_that_forgot_its_weights_is_brought_back(prompts, fakes, engine):
    one = engine()
    for version in (1, 2):
        push(one, version)
    expected = ids(one.generate(prompts, 2, SAMPLING))
    fakes[0].weights, fakes[0].version, fakes[0].prefix = "base", "default", None  # as after a restart
    groups = one.generate(prompts, 2, SAMPLING)
    assert ids(groups) == expected and {c.version for g in groups for c in g.completions} == {2}


def test_another_trainers_push_to_the_same_server_is_noticed(prompts, fakes, engine):
    ours, theirs = engine(), engine()
    push(ours, 1)
    expected = ids(ours.generate(prompts, 2, SAMPLING))
    theirs.send("load", {"w": torch.ones(1)}, version=1)
    theirs.refresh(1, audio_changed=False)
    assert ids(ours.generate(prompts, 2, SAMPLING)) == expected


def test_a_method_that_raises_is_an_error_at_once(fakes, engine):
    with pytest.raises(RolloutError, match="matched nothing"):
        engine(2).call("boom")
    assert sum(path == "/collective_rpc" and body["method"] == "boom" for path, body in fakes[0].log) == 1


def test_a_new_run_takes_back_what_an_earlier_one_sent(prompts, fakes, engine):
    first = engine()
    expected = ids(first.generate(prompts, 2, SAMPLING))
    push(first, 3)
    assert ids(first.generate(prompts, 2, SAMPLING)) != expected
    assert ids(engine().generate(prompts, 2, SAMPLING)) == expected


def test_gpus_are_shared_out():
    assert gpus_of_each(None, 2, 4) == [None, None] and gpus_of_each(3, 1, 1) == ["3"]
    assert gpus_of_each("4, 5,6,7", 2, 2) == ["4,5", "6,7"]
    with pytest.raises(ServerError, match=r"gpus=3 names 1 GPUs, but 2 servers"):
        gpus_of_each(3, 2, 1)


def test_score_asks_for_each_position_behind_the_tokens_before_it(policy, prompts, fakes, engine):
    one = engine()
    groups = one.generate(prompts[:2], 2, SAMPLING)
    fakes[0].log.clear()
    scores = one.score(groups)
    for group, rows in zip(groups, scores, strict=True):
        for completion, row in zip(group.completions, rows, strict=True):
            assert row == list(completion.sampler_logp)
    sizes = sorted(len(r["token_ids"]) for r in asked(fakes[0]))
    assert sizes == sorted(
        len(short(policy, g.prompt)) + t for g in groups for c in g.completions for t in range(len(c.token_ids))
    )


# ---------------------------------------------------------------- servers of our own: processes that die


@pytest.fixture
def started(policy, prompts, tmp_path, monkeypatch):
    """Starts the stand-in as a process in place of vLLM. Returns a maker of engines."""
    (tmp_path / "prompts.json").write_text(json.dumps(known(policy, prompts)))
    fake = Path(__file__).with_name("fake_vllm.py")
    monkeypatch.setattr(
        serve_module.Launch, "command",
        lambda self, port: [sys.executable, str(fake), str(port), str(tmp_path / "prompts.json"), *self.arguments],
    )  # fmt: skip
    engines = []

    def make(**changes):
        engines.append(VLLMServer(policy, **{"backoff": 0.01, "timeout": 20.0, "start_timeout": 60.0} | changes))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def process_of(server) -> int:
    """Process id of the server itself, the keeper's only child."""
    keeper = server.process.keeper.pid
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_moments_of_a_run_nothing_changes(count, prompts, started):
    def run(engine, kills):
        seen = []
        for step in range(12):
            push(engine, step + 1)
            stop, killer = threading.Event(), None
            if step in kills:

                def kill(after=kills[step]):
                    time.sleep(after)
                    os.kill(process_of(random.choice(engine.servers)), signal.SIGKILL)

                killer = threading.Thread(target=kill)
                killer.start()
            seen += [ids(engine.generate(prompts, 2, Sampling(6, 0, step)))]
            stop.set()
            if killer:
                killer.join()
        return seen

    calm = run(started(count=count, arguments=["0.02"]), {})
    rng = random.Random(count)
    engine = started(count=count, arguments=["0.02"])
    kills = {step: rng.uniform(0, 0.06) for step in rng.sample(range(12), 10)}
    assert run(engine, kills) == calm
    assert engine.restarts >= 5  # those killed behind the last answer of a step are found dead by the next push


def test_what_was_broadcast_is_not_repeated_to_a_server_that_comes_back_empty(prompts, started):
    engine = started()
    engine.call("load", once=True, version=1)
    engine.refresh(1, audio_changed=False)
    assert engine.generate(prompts, 2, SAMPLING)
    os.kill(process_of(engine.servers[0]), signal.SIGKILL)
    with pytest.raises(RolloutError, match=r"a broadcast cannot be repeated.*sync\.transport=direct"):
        engine.generate(prompts, 2, SAMPLING)


def test_a_server_that_hangs_is_started_anew(prompts, started):
    engine = started(timeout=5.0)
    push(engine, 1)
    expected = ids(engine.generate(prompts, 2, SAMPLING))
    os.kill(process_of(engine.servers[0]), signal.SIGSTOP)
    assert ids(engine.generate(prompts, 2, SAMPLING)) == expected
    assert engine.restarts == 1


def test_close_leaves_nothing_behind(started):
    engine = started(count=2)
    pids = [process_of(s) for s in engine.servers] + [s.process.keeper.pid for s in engine.servers]
    engine.close()
    assert all(is_gone(pid) for pid in pids) and not engine.exchange.exists()


@pytest.mark.parametrize("how", ["kill", "exception", "exit"])
def test_a_trainer_that_ends_in_any_way_leaves_no_server_behind(how, policy, prompts, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(known(policy, prompts)))
    fake = Path(__file__).with_name("fake_vllm.py")
    code = f"""
import os, signal, sys, threading
from pathlib import Path
from types import SimpleNamespace
from grpo.rollout import serve
serve.Launch.command = lambda self, port: [sys.executable, {str(fake)!r}, str(port), {str(tmp_path / "prompts.json")!r}]
exchange = serve.exchange_folder(shared=True)
launch = serve.Launch(model="x", dtype="float32", token="t", exchange=str(exchange))
process = serve.Process(launch, exchange / "log")
def start():
    process.start(); process.wait(60)
thread = threading.Thread(target=start)  # the thread that started a server may end: the server stays
thread.start(); thread.join()
import time; time.sleep(0.7); assert process.alive
keeper = process.keeper.pid
print(keeper, Path(f"/proc/{{keeper}}/task/{{keeper}}/children").read_text().split()[0], exchange, flush=True)
how = {how!r}
if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
if how == "exception": raise RuntimeError("as planned")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.stdout, done.stderr
    keeper, server, exchange = done.stdout.split()
    wait_until(lambda: is_gone(int(keeper)) and is_gone(int(server)))
    wait_until(lambda: not Path(exchange).exists())


def test_a_keeper_that_is_killed_takes_its_server_along(started):
    engine = started()
    server, keeper = process_of(engine.servers[0]), engine.servers[0].process.keeper.pid
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: is_gone(server))


@pytest.mark.slow
def test_two_ranks_share_servers_that_rank_0_mends(checkpoint, policy, tmp_path):
    import subprocess

    prompts = [policy.encode(make_question(f"q{i}"), make_clip(i, 0.3 + 0.1 * i)) for i in range(4)]
    (tmp_path / "prompts.json").write_text(json.dumps(known(policy, prompts)))
    here = Path(__file__)
    seen = {}
    for how in ("calm", "kill", "hang"):
        port = serve_module.free_port("127.0.0.1")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.grpo.rollout.server_rank", str(checkpoint),
                 str(here.with_name("fake_vllm.py")), str(tmp_path / "prompts.json"), how],
                cwd=here.parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                  "MASTER_PORT": str(port)},
            )
            for rank in range(2)
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=600) for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), [error[-2000:] for _, error in outputs]
        seen[how] = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    calm = [view["answers"] for view in seen["calm"]]
    assert [view["restarts"] for view in seen["calm"]] == [0, 0] and calm[0] != calm[1]
    for how in ("kill", "hang"):
        assert [view["answers"] for view in seen[how]] == calm
        assert [view["restarts"] for view in seen[how]] == [1, 0]


# ---------------------------------------------------------------- what cannot start says so in one line


def launch(**changes):
    return serve_module.Launch(**{"model": "m", "dtype": "float32", "token": "t"} | changes)


def test_a_port_in_use(policy, fakes):
    port = int(fakes[0].url.rsplit(":", 1)[1])
    with pytest.raises(ServerError, match=f"port {port} on 127.0.0.1 is in use .*: choose another rollout.port") as e:
        VLLMServer(policy, port=port)
    assert "\n" not in str(e.value)


def test_a_free_port_is_given_once_and_can_be_bound():
    draw = "from grpo.rollout.serve import free_port; print(*(free_port() for _ in range(400)), flush=True); input()"
    given = []
    with ExitStack() as stack:
        for _ in range(2):  # each holds what it was given until it ends
            one = subprocess.Popen(
                [sys.executable, "-c", draw], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(one.communicate, "")
            given += [int(port) for port in one.stdout.readline().split()]
        assert len(set(given)) == len(given) == 800
        for port in given[::100]:
            socket.create_server(("127.0.0.1", port)).close()  # as servers do: with SO_REUSEADDR


def test_no_port_of_another_machine():
    with pytest.raises(ServerError, match=r"no port on 203\.0\.113\.1: Cannot assign requested address"):
        serve_module.free_port("203.0.113.1")


def test_no_vllm(monkeypatch):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="vllm is not installed: install this project with its extra cpu or gpu"):
        launch()


def test_another_host_needs_a_token(monkeypatch):
    monkeypatch.delenv(serve_module.TOKEN, raising=False)
    for host in ("0.0.0.0", "192.168.0.3", "::"):
        with pytest.raises(ServerError, match="lets other machines in: set"):
            serve_module.choose_token(host, None)
    assert serve_module.choose_token("0.0.0.0", "secret") == "secret"
    first, second = (serve_module.choose_token("127.0.0.1", None) for _ in range(2))
    assert first != second and len(first) > 20


@pytest.mark.parametrize(("last", "advice"), [
    ("ValueError: To serve at least one request with max seq len (4096), 1 GiB KV cache is needed, which is larger "
     "than the available KV cache memory", "KV cache is too small"),
    ("[Errno 98] error while attempting to bind on address: address already in use", "its port is in use"),
    ("RuntimeError: something new", "see its last lines"),
])  # fmt: skip
def test_a_server_that_dies_while_starting_shows_its_last_lines(last, advice, tmp_path, monkeypatch):
    code = f"import sys; print('line one'); print({last!r}); sys.exit(3)"
    monkeypatch.setattr(serve_module.Launch, "command", lambda self, port: [sys.executable, "-c", code])
    process = serve_module.Process(launch(), tmp_path / "log")
    process.start()
    with pytest.raises(ServerError, match="ended while starting") as error:
        process.wait(60)
    assert advice in str(error.value).splitlines()[0] and last in str(error.value)
    process.stop()


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_module.Launch, "command",
                        lambda self, port: [sys.executable, "-c", "import time; time.sleep(600)"])  # fmt: skip
    process = serve_module.Process(launch(), tmp_path / "log")
    process.start()
    pid = process.keeper.pid
    with pytest.raises(ServerError, match="did not answer within"):
        process.wait(0.5)
    assert is_gone(pid)


# ---------------------------------------------------------------- the guard


def test_the_guard_lets_only_the_token_in(monkeypatch):
    import asyncio

    monkeypatch.setenv(serve_module.TOKEN, "secret")
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    guard = serve_module.TokenGuard(app)

    def ask(kind="http", method="GET", headers=()):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "method": method, "path": "/collective_rpc", "headers": list(headers)}
        reached.clear()
        asyncio.run(guard(scope, None, send))
        return bool(reached), sent

    right = (b"authorization", b"Bearer secret")
    assert ask(headers=[right])[0] and ask("lifespan")[0]
    for headers in ([], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"secret")],
                    [(b"authorization", b"Bearer ")], [right, (b"authorization", b"Bearer wrong")]):  # fmt: skip
        for method in ("GET", "POST", "OPTIONS"):
            inside, sent = ask(method=method, headers=headers)
            assert not inside and sent[0]["status"] == 401
        inside, sent = ask("websocket", headers=headers)
        assert not inside and sent == [{"type": "websocket.close", "code": 1008}]
