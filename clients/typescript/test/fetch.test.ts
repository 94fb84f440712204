// Claims about calls over fetch, with answers that no server of ours gives.

import assert from "node:assert/strict";
import { test } from "node:test";

import { BatonClient } from "../src/client.js";
import { FetchTransport } from "../src/transport-fetch.js";
import { all, FakeClock } from "./support.js";

/** A client whose calls are answered in order. */
function client(...answers: ((request: Request) => Response | Promise<Response>)[]) {
  const requests: Request[] = [];
  const clock = new FakeClock();
  const fetcher: typeof fetch = async (input, init) => {
    const request = new Request(input, init);
    requests.push(request);
    const answer = answers[Math.min(requests.length, answers.length) - 1];
    if (answer === undefined) throw new TypeError("fetch failed");
    return answer(request);
  };
  const transport = new FetchTransport(new URL("https://proxy.example/baton/"), fetcher, clock);
  return { baton: new BatonClient(transport, { key: "secret" }, clock), requests, clock };
}

const task = () => Response.json({ taskId: "t", state: "TASK_STATE_SUCCEEDED", fieldOfANewerServer: 1 });

/** An answer that sends text, and then ends, or waits until its call ends as the platform's does. */
function stream(text: string, then: "end" | "wait"): (request: Request) => Response {
  return ({ signal }) => {
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        controller.enqueue(new TextEncoder().encode(text));
        if (then === "end") return controller.close();
        signal.addEventListener("abort", () => controller.error(signal.reason), { once: true });
      },
    });
    return new Response(body, { headers: { "content-type": "text/event-stream" } });
  };
}

const event = (sequence: number, kind: string) =>
  `id: ${sequence}\nevent: ${kind}\ndata: {"sequence":"${sequence}","attempt":1,"${kind}":{}}\n\n`;

test("a call goes below the path of the address, with the key in a header", async () => {
  const { baton, requests } = client(task);
  assert.equal((await baton.get("a b")).taskId, "t");
  const [request] = requests;
  assert.equal(request?.url, "https://proxy.example/baton/v1/tasks/a%20b");
  assert.equal(request?.headers.get("authorization"), "Bearer secret");
  assert.equal(request?.headers.get("x-request-timeout"), "30000ms");
  assert.equal(request?.credentials, "omit");
});

test("what a proxy answers is told apart, repeated, and its Retry-After kept to", async () => {
  const busy = () => new Response("<html>busy</html>", { status: 503, headers: { "retry-after": "7" } });
  const { baton, clock } = client(busy, () => new Response("bad gateway", { status: 502 }), task);
  await baton.get("t");
  assert.deepEqual(clock.waits, [7_050, 100]);
  const lost = client(() => new Response("<html>", { status: 404 }));
  await assert.rejects(lost.baton.get("t"), { name: "UnimplementedError", reason: "UNKNOWN", message: /HTTP 404/ });
});

test("an answer that is no JSON is a broken connection", async () => {
  const { baton, requests } = client(() => new Response('{"taskId": '), task);
  await baton.get("t");
  assert.equal(requests.length, 2);
});

test("a stream that says nothing is opened again where it was", async () => {
  const { baton, requests, clock } = client(
    stream(event(1, "token"), "wait"),
    stream(": keep-alive\n\n" + event(2, "token") + event(3, "ended"), "end"),
  );
  const errors: string[] = [];
  const events = await all(baton.stream("t", { onReconnect: ({ error }) => errors.push(error.message) }).events());
  assert.deepEqual(events.map(({ sequence }) => Number(sequence)), [1, 2, 3]);
  assert.deepEqual(errors, ["nothing came for 45 s"]);
  assert.ok(clock.waits.includes(45_000));
  assert.equal(requests[1]?.url, "https://proxy.example/baton/v1/tasks/t/stream?fromSequence=2");
});

test("an error in a stream is the server's", async () => {
  const status = { code: 9, message: "no", details: [{ "@type": "type.googleapis.com/google.rpc.ErrorInfo", reason: "STATE_CONFLICT", domain: "baton" }] };
  const { baton } = client(stream(`${event(1, "token")}event: error\ndata: ${JSON.stringify(status)}\n\n`, "end"));
  await assert.rejects(all(baton.stream("t")), { name: "PreconditionError", reason: "STATE_CONFLICT", message: "no" });
});

test("leaving a stream ends its call", async () => {
  const { baton, requests } = client(stream(event(1, "token") + event(2, "token"), "wait"));
  for await (const _ of baton.stream("t")) break;
  assert.ok(requests[0]?.signal.aborted);
});

test("a client that is closed ends its streams", async () => {
  const { baton } = client(stream(event(1, "token"), "wait"));
  const events = baton.stream("t").events();
  await events.next();
  const next = events.next();
  baton.close();
  await assert.rejects(next, { reason: "CLIENT_CLOSED" });
});
