// Claims about calls and streams, with a clock and a transport in the tests' hands.

import assert from "node:assert/strict";
import { test } from "node:test";

import { BatonClient, type BatonOptions } from "../src/client.js";
import { connectionLost, errorOf, StreamGapError } from "../src/errors.js";
import { QueueService } from "../src/gen/baton/v1/queues_pb.js";
import { TaskService } from "../src/gen/baton/v1/tasks_pb.js";
import { all, ended, event, FakeClock, FakeTransport, sequences, token, type Script } from "./support.js";

function client(scripts: Script[], options: BatonOptions = {}) {
  const transport = new FakeTransport(...scripts);
  const clock = new FakeClock();
  return { baton: new BatonClient(transport, options, clock), transport, clock };
}

const accepted: Script = () => ({ answers: [{ task: { taskId: "t" } }] });
const down: Script = () => ({ error: connectionLost("connection refused") });
const overloaded = (retryAfterMs?: number): Script => () => ({
  error: errorOf({ code: "RESOURCE_EXHAUSTED", reason: "OVERLOADED", message: "later", retryAfterMs }),
});

test("a submit is repeated under one request id until it is accepted", async () => {
  const { baton, transport, clock } = client([down, down, accepted]);
  const task = await baton.submit("m/n", { a: 1 });
  assert.equal(task.id, "t");
  const ids = transport.calls.map(({ request }) => request["requestId"]);
  assert.equal(ids.length, 3);
  assert.match(String(ids[0]), /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.equal(new Set(ids).size, 1);
  assert.deepEqual(clock.waits, [50, 100]);
});

test("request ids are given to each entry of a batch, and kept where there is one", async () => {
  const { baton, transport } = client([() => ({})]);
  await baton.service(TaskService).batchSubmitTasks({ requests: [{}, { requestId: "mine" }] });
  const requests = transport.calls[0]?.request["requests"] as { requestId: string }[];
  assert.equal(requests[0]?.requestId.length, 36);
  assert.equal(requests[1]?.requestId, "mine");
});

test("the server's time to wait is kept to", async () => {
  const { baton, clock } = client([overloaded(3_000), accepted]);
  await baton.submit("m/n", {});
  assert.deepEqual(clock.waits, [3_050]);
});

test("a refusal without a time to wait is not repeated", async () => {
  const { baton, transport } = client([overloaded(), accepted]);
  await assert.rejects(baton.submit("m/n", {}), { name: "OverloadedError", reason: "OVERLOADED" });
  assert.equal(transport.calls.length, 1);
});

test("what is not safe to repeat is made once", async () => {
  const { baton, transport } = client([down]);
  await assert.rejects(baton.delete("t"), { reason: "CONNECTION_LOST" });
  assert.equal(transport.calls.length, 1);
});

test("reads, and changes that are declared idempotent, are repeated", async () => {
  const { baton, transport } = client([down, () => ({})]);
  await baton.get("t");
  assert.equal(transport.calls.length, 2);
  const second = client([down, () => ({})]);
  await second.baton.service(QueueService).pauseQueue({ model: "a/b" });
  assert.equal(second.transport.calls.length, 2);
});

test("repetitions end with their number, and none are made when there are none", async () => {
  const { baton, transport } = client([down]);
  await assert.rejects(baton.get("t"), { reason: "CONNECTION_LOST" });
  assert.equal(transport.calls.length, 7);
  const never = client([down], { retries: 0 });
  await assert.rejects(never.baton.get("t"), { reason: "CONNECTION_LOST" });
  assert.equal(never.transport.calls.length, 1);
});

test("a wait that would outlast the call ends it with what was wrong", async () => {
  const { baton, transport } = client([overloaded(60_000)], { timeout: "30s" });
  await assert.rejects(baton.get("t"), { reason: "OVERLOADED" });
  assert.equal(transport.calls.length, 1);
});

test("a call ends when its time has passed, and the server is told how much is left", async () => {
  const { baton, transport, clock } = client([overloaded(400), () => ({ hang: true })]);
  await assert.rejects(baton.get("t", { timeout: "1s" }), { name: "CallTimeoutError", reason: "CALL_DEADLINE" });
  assert.deepEqual(transport.calls.map(({ context }) => context.timeoutMs), [1_000, 550]);
  assert.equal(clock.now(), 1_000);
});

test("an abort rejects with its reason, before, during and between calls", async () => {
  const reason = new Error("enough");
  let abort = new AbortController();
  const during: Script = () => {
    queueMicrotask(() => abort.abort(reason));
    return { hang: true };
  };
  const between: Script = (made) => {
    abort.abort(reason);
    return down(made);
  };
  for (const script of [during, between]) {
    abort = new AbortController();
    const { baton, transport } = client([down, script]);
    await assert.rejects(baton.get("t", { signal: abort.signal }), reason);
    assert.equal(transport.calls.length, 2);
  }
  const { baton, transport } = client([() => ({})]);
  await assert.rejects(baton.get("t", { signal: abort.signal }), reason);
  assert.equal(transport.calls.length, 0);
});

test("the key is asked for before each call", async () => {
  let n = 0;
  const { baton, transport } = client([down, () => ({})], { key: async () => `k${(n += 1)}` });
  await baton.get("t");
  assert.deepEqual(
    transport.calls.map(({ context }) => context.headers["authorization"]),
    ["Bearer k1", "Bearer k2"],
  );
});

test("a function that cannot get the key is asked again, and its failure is told", async () => {
  let n = 0;
  const { baton } = client([() => ({ answers: [ended(1)] })], {
    key: () => ((n += 1) < 3 ? Promise.reject(new Error("backend down")) : "k"),
  });
  assert.equal((await all(baton.stream("t").events())).length, 1);
  const never = client([], { key: () => Promise.reject(new Error("backend down")), retries: 1 });
  await assert.rejects(never.baton.get("t"), { reason: "KEY_UNAVAILABLE", message: "cannot get the key: backend down" });
  assert.equal(never.transport.calls.length, 0);
});

test("each sequence comes once, in order, over broken connections", async () => {
  const { baton, transport, clock } = client([
    () => ({ answers: [token(1, "a"), token(2, "b")], error: connectionLost("reset") }),
    down,
    () => ({ answers: [token(2, "b"), token(3, "c")] }),
    () => ({ answers: [token(4, "d"), ended(5)] }),
  ]);
  const reconnects: number[] = [];
  const stream = baton.stream("t", { onReconnect: ({ attempt }) => reconnects.push(attempt) });
  const tokens = await all(stream);
  assert.deepEqual(tokens.map(({ text }) => text), ["a", "b", "c", "d"]);
  assert.deepEqual(transport.calls.map(({ request }) => request["fromSequence"]), [1n, 3n, 3n, 4n]);
  assert.deepEqual(reconnects, [1, 2, 1]);
  assert.deepEqual(clock.waits, [50, 100, 50]);
  assert.equal(stream.nextSequence, 6n);
});

test("a stream goes on from where it is told", async () => {
  const { baton, transport } = client([() => ({ answers: [token(7, "g"), ended(8)] })]);
  assert.deepEqual(sequences(await all(baton.stream("t", { from: 7 }).events())), [7, 8]);
  assert.equal(transport.calls[0]?.request["fromSequence"], 7n);
});

test("a missing event counts as a broken connection, never as read", async () => {
  const { baton, transport } = client([
    () => ({ answers: [token(1, "a"), token(3, "c")] }),
    () => ({ answers: [token(2, "b"), token(3, "c"), ended(4)] }),
  ]);
  assert.deepEqual(sequences(await all(baton.stream("t").events())), [1, 2, 3, 4]);
  assert.equal(transport.calls[1]?.request["fromSequence"], 2n);
});

test("a gap is an event, and an error to who reads tokens", async () => {
  const script: Script = () => ({
    answers: [
      token(1, "a"),
      event(9, { case: "gap", value: { firstSequence: 1n, reason: "crash" } }),
      token(10, "b"),
      ended(11),
    ],
  });
  const events = await all(client([script]).baton.stream("t").events());
  assert.deepEqual(sequences(events), [1, 9, 10, 11]);
  const gap = events[1]?.body;
  assert.ok(gap?.case === "gap" && gap.value.firstSequence === 2n, "what was read is not lost");
  const read: string[] = [];
  const error = await (async () => {
    for await (const { text } of client([script]).baton.stream("t")) read.push(text);
  })().catch((error: unknown) => error);
  assert.deepEqual(read, ["a"]);
  assert.ok(error instanceof StreamGapError);
  assert.deepEqual([error.firstSequence, error.nextSequence, error.reason], [2n, 10n, "STREAM_GAP"]);
});

test("the tokens of another attempt announce themselves", async () => {
  const { baton } = client([
    () => ({ answers: [token(1, "a"), token(2, "b"), token(3, "a", 2), token(4, "b", 2), ended(5)] }),
  ]);
  const tokens = await all(baton.stream("t"));
  assert.deepEqual(tokens.map(({ restart }) => restart), [false, false, true, false]);
});

test("figures without a sequence come through", async () => {
  const { baton } = client([
    () => ({ answers: [token(1, "a"), event(0, { case: "metrics", value: {} }), event(0, { case: "metrics", value: {} }), ended(2)] }),
  ]);
  assert.deepEqual(sequences(await all(baton.stream("t", { metrics: true }).events())), [1, 0, 0, 2]);
});

test("a stream gives up when nothing came for as long as it is patient", async () => {
  const { baton, clock } = client([() => ({ answers: [token(1, "a")] }), down], { patience: "1m" });
  await assert.rejects(all(baton.stream("t")), { reason: "CONNECTION_LOST" });
  assert.ok(clock.now() > 50_000 && clock.now() <= 60_000, `${clock.now()} ms`);
});

test("an answer that will not change ends a stream", async () => {
  const gone: Script = () => ({ error: errorOf({ code: "NOT_FOUND", reason: "NOT_FOUND", message: "gone" }) });
  const { baton, transport } = client([gone]);
  await assert.rejects(all(baton.stream("t")), { name: "NotFoundError" });
  assert.equal(transport.calls.length, 1);
});

test("a token that ran out is renewed once, where a function gives another", async () => {
  const expired: Script = () => ({
    error: errorOf({ code: "UNAUTHENTICATED", reason: "UNAUTHENTICATED", message: "expired" }),
  });
  const scripts = [expired, () => ({ answers: [ended(1)] })];
  assert.equal((await all(client(scripts, { key: () => "new" }).baton.stream("t").events())).length, 1);
  await assert.rejects(all(client(scripts, { key: "fixed" }).baton.stream("t")), { reason: "UNAUTHENTICATED" });
  const { baton, transport } = client([expired], { key: () => "bad" });
  await assert.rejects(all(baton.stream("t")), { reason: "UNAUTHENTICATED" });
  assert.equal(transport.calls.length, 2);
});

test("a run that breaks before its task is known is made again under the same id", async () => {
  const queued = event(1, { case: "queued", value: { taskId: "t" } });
  const { baton, transport } = client([
    down,
    () => ({ answers: [queued, token(2, "a")] }),
    () => ({ answers: [token(3, "b"), ended(4)] }),
  ]);
  const run = baton.run("m/n", {}, { onDisconnect: "keep" });
  assert.equal(run.taskId, undefined);
  assert.deepEqual((await all(run)).map(({ text }) => text), ["a", "b"]);
  assert.equal(run.taskId, "t");
  const [first, second, third] = transport.calls;
  assert.deepEqual([first?.method, second?.method, third?.method], ["RunTask", "RunTask", "StreamTask"]);
  assert.equal(first?.request["requestId"], second?.request["requestId"]);
  assert.deepEqual([third?.request["taskId"], third?.request["fromSequence"]], ["t", 3n]);
});

test("a run that is left cancels its task, unless it is to be kept", async () => {
  const queued = event(1, { case: "queued", value: { taskId: "t" } });
  for (const [onDisconnect, methods] of [
    ["cancel", ["RunTask", "CancelTask"]],
    ["keep", ["RunTask"]],
  ] as const) {
    const { baton, transport } = client([() => ({ answers: [queued, token(2, "a"), token(3, "b")] }), () => ({})]);
    const run = baton.run("m/n", {}, { onDisconnect });
    for await (const _ of run) break;
    assert.deepEqual(transport.calls.map(({ method }) => method), methods);
    await assert.rejects(run.result(), /left before its end/);
    await assert.rejects(all(run), /read once/);
  }
});

test("several tasks share a stream and resume each where it was", async () => {
  const { baton, transport } = client([
    () => ({ answers: [token(1, "a", 1, "x"), token(5, "e", 1, "y"), ended(2, 3, "x")] }),
    () => ({ answers: [token(6, "f", 1, "y"), ended(7, 3, "y")] }),
  ]);
  const events = await all(baton.streamMany(["x", { taskId: "y", from: 5 }]));
  assert.deepEqual(events.map(({ taskId, sequence }) => `${taskId}${sequence}`), ["x1", "y5", "x2", "y6", "y7"]);
  const others = transport.calls[0]?.request["others"] as { taskId: string; afterSequence: bigint }[];
  assert.deepEqual([others[0]?.taskId, others[0]?.afterSequence], ["y", 4n]);
  assert.deepEqual([transport.calls[1]?.request["taskId"], transport.calls[1]?.request["fromSequence"]], ["y", 6n]);
});

test("a watch that comes back says that it missed something, once the server watches again", async () => {
  const { baton, transport } = client([
    () => ({ answers: [event(1, { case: "queued", value: {} }, 0, "x")] }),
    down,
    () => ({ answers: [event(2, { case: "queued", value: {} }, 0, "x")], hang: true }),
  ]);
  const seen: unknown[] = [];
  for await (const { body } of baton.watch()) {
    seen.push([body.case, transport.calls.length]);
    if (seen.length === 3) break;
  }
  assert.deepEqual(seen, [["queued", 1], ["gap", 3], ["queued", 3]]);
});
