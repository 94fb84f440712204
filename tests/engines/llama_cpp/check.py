"""Streams tasks through a Baton server and a runner with engine `openai` from a real llama.cpp
server: check.py BATON. Each check is a function whose name is its claim; exits non-zero when one
fails, with the ends of the logs.

No check waits for a time to pass: each waits for a condition, with a bound.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

BATON = sys.argv[1]
HERE = pathlib.Path(__file__).parent
MODEL = "test/llama"
# Far more than is computed before a cancel can arrive.
LONG = 50_000
BOUND = 15

children = []


class Child:
    """A process with what it says; ends with this one."""

    def __init__(self, name, command, ready, env=None):
        self.name, self.lines, self.seen = name, [], threading.Condition()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        children.append(self)
        # A pipe each: on one, the lines of both can run into each other.
        for pipe in (self.process.stdout, self.process.stderr):
            threading.Thread(target=self._read, args=(pipe,), daemon=True).start()
        self.ready = self.line_with(ready)

    def _read(self, pipe):
        for line in pipe:
            with self.seen:
                self.lines.append(line.decode(errors="replace").rstrip())
                self.seen.notify_all()

    def line_with(self, text):
        """The first line that has `text`."""

        def find():
            return next((line for line in self.lines if text in line), None)

        with self.seen:
            found = self.seen.wait_for(find, BOUND)
        assert found, f"{self.name} did not say `{text}`"
        return found

    def end(self):
        self.process.kill()
        self.process.wait()


def end_children():
    for child in reversed(children):
        child.end()


def eventually(what, condition):
    """Waits until the condition gives something."""
    started = time.monotonic()
    tick = threading.Event()
    while not (value := condition()):
        assert time.monotonic() - started < BOUND, f"not within {BOUND} s: {what}"
        tick.wait(0.02)
    return value


class Llama:
    """What the llama.cpp server says of itself."""

    def __init__(self, url):
        self.url = url

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=BOUND) as answer:
            return answer.read().decode()

    def metric(self, name):
        lines = self.get("/metrics").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"llamacpp:{name} "))

    def busy(self):
        return [slot for slot in json.loads(self.get("/slots")) if slot["is_processing"]]


class Baton:
    """The command line, against one server."""

    def __init__(self, address):
        self.env = {**os.environ, "BATON_ADDRESS": address}

    def command(self, *arguments):
        return [BATON, *arguments]

    def call(self, *arguments):
        command = self.command(*arguments)
        done = subprocess.run(command, env=self.env, capture_output=True, timeout=BOUND, check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def run(self, **spec):
        """Runs a task to its end: exit code and events."""
        path = pathlib.Path(work_dir.name) / "task.json"
        path.write_text(json.dumps({"model": MODEL, **spec}))
        code, out, err = self.call("run", "--json", str(path), "-o", "jsonl")
        events = [json.loads(line) for line in out.splitlines()]
        assert events, f"no events; {err}"
        return code, events


def tokens(events):
    return [event["token"]["text"] for event in events if "token" in event]


def ended(events):
    assert "ended" in events[-1], events[-1]
    return events[-1]["ended"]


def messages(text):
    return {"messages": [{"role": "user", "content": text}]}


def tokens_and_usage_come_from_the_server(baton, llama):
    before = llama.metric("tokens_predicted_total")
    params = {"max_tokens": 40, "ignore_eos": True, "temperature": 1}
    code, events = baton.run(input=messages("hello"), params=params)
    end = ended(events)
    assert (code, end["state"]) == (0, "TASK_STATE_SUCCEEDED"), end
    sequences = [event["sequence"] for event in events]
    assert sequences == list(range(1, len(events) + 1)), sequences
    assert len(tokens(events)) > 10, events
    assert "".join(tokens(events)) == end["result"]["text"], end
    assert end["result"]["finish_reason"] == "length", end
    usage = end["usage"]
    assert (usage["tokens_in"], usage["tokens_out"]) == (len("hello\n") + 2, 40), usage
    made = llama.metric("tokens_predicted_total") - before
    assert made == 40, f"the server says that it made {made} tokens"


def the_same_seed_gives_the_same_text(baton, _llama):
    params = {"max_tokens": 30, "ignore_eos": True, "temperature": 1, "cache_prompt": False}
    spec = {"input": {"prompt": "once upon a time"}, "params": params}
    texts = [ended(baton.run(**spec, seed=seed)[1])["result"]["text"] for seed in (11, 11, 12)]
    assert texts[0] == texts[1] != texts[2], texts


def a_cancel_in_the_middle_stops_the_computing(baton, llama):
    before = llama.metric("n_decode_total")
    params = json.dumps({"max_tokens": LONG, "ignore_eos": True})
    arguments = ("submit", MODEL, "-i", "prompt=on and on", "--params", params, "-o", "json")
    code, out, err = baton.call(*arguments)
    assert code == 0, err
    task = json.loads(out)["task"]["task_id"]
    follow = Child("follow", baton.command("follow", task, "-o", "jsonl"), '"token"', baton.env)
    assert llama.busy(), "the task streams and no slot computes"
    code, _, err = baton.call("task", "cancel", task)
    assert code == 0, err
    end = ended([json.loads(follow.line_with('"ended"'))])
    assert end["state"] == "TASK_STATE_CANCELLED", end
    eventually("no slot computes", lambda: not llama.busy())
    made = llama.metric("n_decode_total") - before
    assert made < LONG / 2, f"{made} of {LONG} tokens were computed all the same"

    # From here on the server computes what the next task needs, and nothing else.
    idle = llama.metric("n_decode_total")
    params = {"max_tokens": 10, "ignore_eos": True}
    _, events = baton.run(input={"prompt": "next"}, params=params)
    assert ended(events)["usage"]["tokens_out"] == 10, events[-1]
    extra = llama.metric("n_decode_total") - idle
    assert extra <= 12, f"{extra} steps for 10 tokens: the cancelled request goes on"
    return f"{int(made)} of {LONG} tokens computed"


def a_prompt_too_long_is_the_tasks_own_fault(baton, _llama):
    prompt = "a" * 70_000
    code, events = baton.run(input={"prompt": prompt}, params={"max_tokens": 5})
    end = ended(events)
    assert (code, end["state"]) == (20, "TASK_STATE_FAILED"), end
    error = end["error"]
    assert error["reason"] == "INPUT_REJECTED", error
    assert error["metadata"]["http_status"] == "400", error
    assert "context size" in error["message"], error
    attempts = sum("attempt_started" in event for event in events)
    assert attempts == 1, f"tried {attempts} times"


def a_server_that_is_gone_is_worth_another_try(baton, _llama):
    llama_process.end()
    spec = {"input": {"prompt": "a"}, "retry": {"max_attempts": 2, "initial_backoff": "0.05s"}}
    code, events = baton.run(**spec)
    end = ended(events)
    assert (code, end["state"]) == (20, "TASK_STATE_DEAD_LETTERED"), end
    assert end["error"]["reason"] == "ENGINE_ERROR", end
    attempts = sum("attempt_started" in event for event in events)
    assert attempts == 2, f"tried {attempts} times"


CHECKS = [
    tokens_and_usage_come_from_the_server,
    the_same_seed_gives_the_same_text,
    a_cancel_in_the_middle_stops_the_computing,
    a_prompt_too_long_is_the_tasks_own_fault,
    a_server_that_is_gone_is_worth_another_try,
]

atexit.register(end_children)
work_dir = tempfile.TemporaryDirectory()
try:
    gguf = f"{work_dir.name}/random.gguf"
    serve = [sys.executable, str(HERE / "serve.py"), gguf]
    llama_process = Child("llama.cpp", serve, "serving on ")
    upstream = llama_process.ready.split()[-1]
    dev = ["dev", "--ephemeral", "--no-runner", "--addr", "127.0.0.1:0"]
    server = Child("server", [BATON, *dev], "gRPC")
    address = server.ready.split()[-1]
    start = ["runner", "start", "--engine", "openai", "--upstream", upstream, "--model", MODEL]
    Child("runner", [BATON, *start, "--slots", "2"], "connected", {"BATON_ADDRESS": address})
    for check in CHECKS:
        started = time.monotonic()
        note = check(Baton(address), Llama(upstream))
        took = time.monotonic() - started
        print(f"ok   {check.__name__} ({took:.1f} s{f'; {note}' if note else ''})")
    for child in children:
        assert not any("panicked" in line for line in child.lines), f"{child.name} panicked"
except BaseException:
    for child in children:
        print(f"--- end of {child.name}", *child.lines[-20:], sep="\n", file=sys.stderr)
    raise
