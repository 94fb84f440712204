// The official fal client for JavaScript, unchanged: by its proxy setting, and by its middleware.

import assert from "node:assert/strict";
import { ApiError, createFalClient, ValidationError } from "@fal-ai/client";

const ECHO = "baton/echo";
const base = `https://${process.env.HOST}`;
const fal = createFalClient({
  credentials: "unused",
  proxyUrl: { url: `${base}/fal/proxy`, when: "always" },
});

// The queue: followed by polling and by stream.
for (const mode of ["polling", "streaming"]) {
  const updates = [];
  const answer = await fal.subscribe(ECHO, {
    input: { text: "hello from fal", params: { delay_ms: 100, log: ["warm"] } },
    mode,
    logs: true,
    pollInterval: 50,
    priority: "low",
    startTimeout: 30,
    onQueueUpdate: (update) => updates.push(update),
  });
  assert.deepEqual(answer.data, { text: "hello from fal" });
  const last = updates.at(-1);
  assert.equal(last.status, "COMPLETED");
  assert.equal(last.request_id, answer.requestId);
  assert.deepEqual(last.logs.map((line) => line.message), ["warm"], mode);
  assert.ok(updates.slice(0, -1).every(({ status }) => ["IN_QUEUE", "IN_PROGRESS"].includes(status)));
}

// Direct calls.
const run = await fal.run("baton/ngram", { input: { prompt: "Alice was", params: { max_tokens: 8 } } });
assert.equal(run.data.finish_reason, "length");
assert.match(run.requestId, /^[0-9a-f-]{36}$/);
const stream = await fal.stream(ECHO, { input: { text: "one two three" } });
let text = "";
for await (const event of stream) {
  if (event.type === "token") text += event.text;
}
assert.equal(text, "one two three");
assert.deepEqual(await stream.done(), { text: "one two three" });

// Cancel: in the middle of the work, and too late.
const endless = { text: "on and on", params: { repeat: 10_000, delay_ms: 20 } };
const { request_id: requestId, queue_position: position } = await fal.queue.submit(ECHO, { input: endless });
assert.equal(position, 0);
const running = async () => (await fal.queue.status(ECHO, { requestId })).status === "IN_PROGRESS";
while (!(await running())) await new Promise((resolve) => setTimeout(resolve, 50));
await fal.queue.cancel(ECHO, { requestId });
const status = await fal.queue.status(ECHO, { requestId, logs: true });
assert.equal(status.status, "COMPLETED");
assert.equal(status.error_type, "client_cancelled");
await assert.rejects(fal.queue.result(ECHO, { requestId }), { name: "ApiError", status: 499, requestId });
await assert.rejects(fal.queue.cancel(ECHO, { requestId }), { name: "ApiError", status: 400 });

// Who aborts a direct call gets out of it.
const abort = new AbortController();
setTimeout(() => abort.abort(), 300);
await assert.rejects(fal.run(ECHO, { input: endless, abortSignal: abort.signal }), { name: "AbortError" });

// Errors: of the input, of the task, of the request.
await assert.rejects(fal.run(ECHO, { input: { wrong: 1 } }), (error) => {
  assert.ok(error instanceof ValidationError);
  assert.match(error.fieldErrors[0].msg, /input\.text/);
  return true;
});
const failing = { text: "x", params: { fail: { message: "on purpose", retryable: false } } };
await assert.rejects(fal.subscribe(ECHO, { input: failing }), (error) => {
  assert.ok(error instanceof ApiError);
  assert.equal(error.status, 500);
  assert.equal(error.message, "on purpose");
  assert.equal(error.body.error_type, "runner_server_error");
  return true;
});
await assert.rejects(fal.run("baton/none", { input: {} }), { name: "ApiError", status: 404 });
const hook = fal.queue.submit(ECHO, { input: {}, webhookUrl: "https://example.org/hook" });
await assert.rejects(hook, { name: "ApiError", status: 400, message: /fal_webhook/ });

// Without a proxy: a middleware names the addresses.
const direct = createFalClient({
  credentials: "unused",
  requestMiddleware: async (request) => ({
    ...request,
    url: request.url
      .replace("https://queue.fal.run/", `${base}/fal/`)
      .replace("https://fal.run/", `${base}/fal/run/`),
  }),
});
assert.deepEqual((await direct.run(ECHO, { input: { text: "a" } })).data, { text: "a" });
assert.deepEqual((await direct.subscribe(ECHO, { input: { text: "b" } })).data, { text: "b" });
console.log("ok: queue, direct calls, streams, cancel and errors");
