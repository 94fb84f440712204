// The official openai client for Node, unchanged: chats, completions, streams, cancel, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [ECHO, NGRAM] = ["baton/echo", "baton/ngram"];
const client = new OpenAI();
const say = (content) => [{ role: "user", content }];

async function state(id) {
  const answer = await fetch(`https://${process.env.HOST}/v1/tasks/${id.slice(id.indexOf("-") + 1)}`);
  return (await answer.json()).state;
}
async function eventually(id, wanted) {
  for (let left = 400; (await state(id)) !== wanted; left -= 1) {
    assert.ok(left > 0, `${id} is not ${wanted}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

// Models.
const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes(ECHO) && models.includes(NGRAM), models.join());
assert.equal((await client.models.retrieve(ECHO)).owned_by, "baton");

// A chat, whole and in pieces.
const chat = await client.chat.completions.create({ model: ECHO, messages: say("hello from openai") });
assert.equal(chat.choices[0].message.content, "hello from openai");
assert.equal(chat.choices[0].finish_reason, "stop");
assert.deepEqual(chat.usage, { prompt_tokens: 3, completion_tokens: 3, total_tokens: 6 });
assert.ok(chat._request_id);
const stream = await client.chat.completions.create({
  model: NGRAM,
  messages: say("Alice was"),
  max_completion_tokens: 12,
  stream: true,
  stream_options: { include_usage: true },
});
let [text, usage, reason] = ["", null, null];
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  reason = chunk.choices[0]?.finish_reason ?? reason;
  usage = chunk.usage ?? usage;
}
assert.ok(text);
assert.deepEqual([reason, usage.completion_tokens], ["length", 12]);
const helped = client.chat.completions.stream({ model: ECHO, messages: say("by events") });
assert.equal(await helped.finalContent(), "by events");

// Completions.
const completion = await client.completions.create({ model: NGRAM, prompt: "Call me", max_tokens: 5 });
assert.ok(completion.choices[0].text);
assert.equal(completion.usage.completion_tokens, 5);

// Who leaves cancels the work.
const endless = { model: ECHO, messages: say("on"), repeat: 100_000, delay_ms: 20 };
const left = await client.chat.completions.create({ ...endless, stream: true });
let id;
for await (const chunk of left) {
  id = chunk.id;
  if (chunk.choices[0].delta.content) break;
}
await eventually(id, "TASK_STATE_CANCELLED");
const signal = AbortSignal.timeout(300);
await assert.rejects(client.chat.completions.create(endless, { signal }), OpenAI.APIUserAbortError);

// Errors: of the request, of the credential, of the task, in the middle of a stream.
const create = (more) => client.chat.completions.create({ model: ECHO, messages: say("one two three"), ...more });
await assert.rejects(create({ model: "gpt-4" }), { status: 404, code: "model_not_found", param: "model" });
await assert.rejects(create({ n: 2 }), { status: 400, param: "n", type: "invalid_request_error" });
const stranger = new OpenAI({ apiKey: "bt_0_0" });
await assert.rejects(stranger.models.list(), { status: 401, code: "invalid_api_key" });
const fail = { message: "on purpose", retryable: false };
await assert.rejects(create({ fail }), { status: 500, code: "task_failed", message: /on purpose/ });
const broken = await create({ stream: true, delay_ms: 20, fail: { ...fail, after: 2 } });
await assert.rejects(async () => {
  for await (const _ of broken);
}, { code: "task_failed" });
console.log("ok: models, chats, completions, streams, cancel and errors");
