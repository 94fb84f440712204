"""The official openai client for Python, unchanged: chats, completions, streams, cancel, errors."""

import asyncio
import json
import os
import ssl
import time
import urllib.request

import openai

ECHO, NGRAM = "baton/echo", "baton/ngram"
client = openai.OpenAI()


def say(text):
    """Messages whose last is `text`."""
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def refusal(kind, call, **named):
    """The error of a kind that a call must end with."""
    try:
        call(**named)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def task(completion_id):
    """The task of a completion."""
    context = ssl.create_default_context(cafile=os.environ["CA"])
    url = f"https://{os.environ['HOST']}/v1/tasks/{completion_id.split('-', 1)[1]}"
    with urllib.request.urlopen(url, context=context) as answer:
        return json.load(answer)


def eventually(completion_id, state):
    """Waits until the task of a completion is in this state."""
    until = time.monotonic() + 20
    while (now := task(completion_id)["state"]) != state:
        assert time.monotonic() < until, now
        time.sleep(0.05)


# Models.
assert {ECHO, NGRAM} <= {model.id for model in client.models.list()}
assert client.models.retrieve(ECHO).owned_by == "baton"

# A chat, whole.
chat = client.chat.completions.create(
    model=ECHO, messages=say("hello from openai"), temperature=0.5, metadata={"team": "demo"}
)
choice = chat.choices[0]
assert (choice.message.role, choice.message.content) == ("assistant", "hello from openai"), chat
assert choice.finish_reason == "stop" and chat.model == ECHO and chat.object == "chat.completion"
assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (3, 3, 6)
assert abs(time.time() - chat.created) < 60 and chat._request_id
assert task(chat.id)["spec"]["labels"] == {"team": "demo"}

# A chat in pieces, the same for the same seed.
texts = []
for _ in range(2):
    stream = client.chat.completions.create(
        model=NGRAM,
        messages=say("Alice was"),
        max_completion_tokens=12,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    assert chunks[-2].choices[0].finish_reason == "length", chunks[-2]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12, chunks[-1]
    assert len(chunks) == 15 and len({chunk.id for chunk in chunks}) == 1
    texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]))
assert texts[0] and texts[0] == texts[1], texts
with client.chat.completions.stream(model=ECHO, messages=say("by events")) as events:
    assert events.until_done().get_final_completion().choices[0].message.content == "by events"

# Completions.
text = client.completions.create(model=NGRAM, prompt="Call me", max_tokens=5, seed=1)
assert text.choices[0].text and text.choices[0].finish_reason == "length" and text.usage.completion_tokens == 5
pieces = client.completions.create(model=NGRAM, prompt="Call me", max_tokens=5, seed=1, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text

# Who leaves a stream cancels the work.
endless = {"repeat": 100_000, "delay_ms": 20}
stream = client.chat.completions.create(model=ECHO, messages=say("on"), stream=True, extra_body=endless)
for chunk in stream:
    if chunk.choices[0].delta.content:
        break
stream.close()
eventually(chunk.id, "TASK_STATE_CANCELLED")
refusal(
    openai.APITimeoutError,
    client.with_options(timeout=1, max_retries=0).chat.completions.create,
    model=ECHO,
    messages=say("on"),
    extra_body=endless,
)

# Errors: of the request, of the credential, of the task, in the middle of a stream.
create = client.chat.completions.create
error = refusal(openai.NotFoundError, create, model="gpt-4", messages=say("x"))
assert (error.code, error.param, error.type) == ("model_not_found", "model", "invalid_request_error")
error = refusal(openai.NotFoundError, client.models.retrieve, model="baton/none")
assert error.code == "model_not_found"
assert refusal(openai.BadRequestError, create, model=ECHO, messages=say("x"), n=2).param == "n"
assert refusal(openai.BadRequestError, create, model=ECHO, messages=[]).param == "messages"
error = refusal(openai.BadRequestError, create, model=ECHO, messages=say("x"), stop=["y"])
assert error.code == "input_rejected" and "stop" in error.message, error
stranger = openai.OpenAI(api_key="bt_0_0").chat.completions.create
assert refusal(openai.AuthenticationError, stranger, model=ECHO, messages=say("x")).code == "invalid_api_key"
fail = {"message": "on purpose", "retryable": False}
error = refusal(openai.InternalServerError, create, model=ECHO, messages=say("x"), extra_body={"fail": fail})
assert error.code == "task_failed" and "on purpose" in error.message and error.request_id, error
stream = create(
    model=ECHO, messages=say("one two three"), stream=True, extra_body={"delay_ms": 20, "fail": {**fail, "after": 2}}
)
error = refusal(openai.APIError, lambda: list(stream))
assert error.code == "task_failed", error


async def asynchronous():
    """The same client, asynchronous."""
    client = openai.AsyncOpenAI()
    chat = await client.chat.completions.create(model=ECHO, messages=say("a"))
    assert chat.choices[0].message.content == "a"
    stream = await client.chat.completions.create(model=ECHO, messages=say("b c"), stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "b c"


asyncio.run(asynchronous())
print("ok: models, chats, completions, streams, cancel and errors")
