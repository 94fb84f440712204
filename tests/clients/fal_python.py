"""The official fal client for Python, unchanged: queue, direct calls, streams, cancel, errors."""

import asyncio
import time

import fal_client
from fal_client import Completed, FalClientHTTPError, InProgress, Queued

ECHO, NGRAM = "baton/echo", "baton/ngram"


def refusal(call, *arguments, **named):
    """The error that a call must end with."""
    try:
        call(*arguments, **named)
    except FalClientHTTPError as error:
        return error
    raise AssertionError("nothing was refused")


# The queue: submit, follow with log lines, result.
slow = {"text": "hello from fal", "params": {"delay_ms": 100, "log": ["warm"], "stages": ["LOADING"]}}
handle = fal_client.submit(ECHO, slow, priority="low", start_timeout=30, headers={"X-Fal-No-Retry": "1"})
seen = list(handle.iter_events(with_logs=True, interval=0.05))
assert all(isinstance(status, (Queued, InProgress)) for status in seen[:-1]), seen
done = seen[-1]
assert isinstance(done, Completed) and done.error is None, done
assert [line["message"] for line in done.logs] == ["LOADING 100%", "warm"], done.logs
assert done.metrics["inference_time"] > 0.2, done.metrics
assert handle.get() == {"text": "hello from fal"}
# By id alone, as another process would.
assert fal_client.result(ECHO, handle.request_id) == {"text": "hello from fal"}
assert isinstance(fal_client.status(ECHO, handle.request_id), Completed)

# All of that in one call, for another engine, on a path of the app.
updates = []
result = fal_client.subscribe(
    NGRAM, {"prompt": "Alice was", "params": {"max_tokens": 8}}, path="/fast", on_queue_update=updates.append
)
assert result["text"] and result["finish_reason"] == "length", result
assert isinstance(updates[-1], Completed), updates

# Direct calls.
assert fal_client.run(ECHO, {"text": "at once"}) == {"text": "at once"}
events = list(fal_client.stream(ECHO, {"text": "one two three"}))
assert "".join(event["text"] for event in events[:-1]) == "one two three", events
assert events[-1] == {"text": "one two three"}, events

# Cancel: in the middle of the work, and too late.
handle = fal_client.submit(ECHO, {"text": "on and on", "params": {"repeat": 10_000, "delay_ms": 20}})
for status in handle.iter_events(interval=0.05):
    if isinstance(status, InProgress):
        break
handle.cancel()
status = handle.status()
assert isinstance(status, Completed) and status.error_type == "client_cancelled", status
error = refusal(handle.get)
assert (error.status_code, error.error_type) == (499, "client_cancelled"), error
assert refusal(handle.cancel).status_code == 400

# Errors: of the task, of its input, of the request.
failing = {"text": "x", "params": {"fail": {"message": "on purpose", "retryable": False}}}
handle = fal_client.submit(ECHO, failing)
error = refusal(handle.get)
assert (error.status_code, error.error_type) == (500, "runner_server_error"), error
assert str(error) == "on purpose", error
status = handle.status(with_logs=True)
assert (status.error, status.error_type) == ("on purpose", "runner_server_error"), status
error = refusal(fal_client.run, ECHO, {"wrong": 1})
assert error.status_code == 422 and "input.text" in error.message[0]["msg"], error
assert refusal(fal_client.run, "baton/none", {}).status_code == 404
assert refusal(fal_client.status, ECHO, "018f0000-0000-7000-8000-000000000000").status_code == 404
error = refusal(fal_client.submit, ECHO, {}, webhook_url="https://example.org/hook")
assert error.status_code == 400 and "fal_webhook" in str(error), error
error = refusal(fal_client.SyncClient(key="bt_0_0").submit, ECHO, {})
assert error.status_code == 401, error

# Nobody starts it in time.
started = time.monotonic()
handle = fal_client.submit("nobody/serves-this", {}, start_timeout=1.5)
error = refusal(handle.get)
assert (error.status_code, error.error_type) == (504, "request_timeout"), error
assert 1 < time.monotonic() - started < 20


async def asynchronous():
    """The same client, asynchronous."""
    client = fal_client.AsyncClient()
    assert await client.run(ECHO, {"text": "a"}) == {"text": "a"}
    assert await client.subscribe(ECHO, {"text": "b"}) == {"text": "b"}
    events = [event async for event in client.stream(ECHO, {"text": "c"})]
    assert events[-1] == {"text": "c"}, events


asyncio.run(asynchronous())
print("ok: queue, direct calls, streams, cancel and errors")
