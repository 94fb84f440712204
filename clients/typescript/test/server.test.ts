// Claims about the client against the real server, each over gRPC and over fetch.

import assert from "node:assert/strict";
import { once } from "node:events";
import { execFile } from "node:child_process";
import { createServer, type AddressInfo, type Socket } from "node:net";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";

import * as browser from "../src/browser.js";
import * as node from "../src/node.js";
import { all, sequences } from "./support.js";
import { eventually, freePort, Server, SOON } from "./server.js";

const { TaskState } = node;
type Client = node.BatonClient;

const CLIENTS: Record<string, (options: { url: string; key?: node.Credential }) => Client> = {
  "gRPC": (options) => new node.Baton(options),
  "fetch": (options) => new browser.Baton(options),
};

/** A task that takes `n / pace` seconds. */
const slow = (n: number, pace: number) => ({ params: { max_tokens: n, tokens_per_second: pace }, seed: 8 });
const PROMPT = { prompt: "Alice was beginning to" };

let server: Server;
before(async () => (server = await Server.start()));
after(() => server.stop());

for (const [transport, connect] of Object.entries(CLIENTS)) {
  describe(transport, { timeout: 120_000 }, () => {
    let baton: Client;
    before(() => (baton = connect({ url: server.url })));
    after(() => baton.close());

    test("a task streams its tokens once, and its result is their text", async () => {
      const task = await baton.submit("baton/ngram", PROMPT, { seed: 8, params: { max_tokens: 40 } });
      const stream = task.tokens();
      const tokens = await all(stream);
      assert.deepEqual(tokens.map(({ index }) => Number(index)), [...Array(40).keys()]);
      const result = await stream.result();
      assert.equal(tokens.map(({ text }) => text).join(""), result.text);
      assert.deepEqual(result.output, { text: result.text, finish_reason: "length" });
      assert.equal(result.usage?.tokensOut, 40n);
      assert.deepEqual(await task.result(), result);
      assert.equal((await task.get()).state, TaskState.SUCCEEDED);
      const events = await all(task.events());
      assert.deepEqual(sequences(events), events.map((_, at) => at + 1));
      assert.deepEqual(sequences(await all(task.events({ from: 11 }))), sequences(events).slice(10));
    });

    test("a run submits and streams in one call", async () => {
      const run = baton.run<{ text: string }, { text: string }>("baton/echo", { text: "to be or not" });
      const texts = (await all(run)).map(({ text }) => text);
      assert.equal(texts.join(""), "to be or not");
      assert.equal((await run.result()).output.text, "to be or not");
    });

    test("one request id gives one task, and another request under it is refused", async () => {
      const requestId = `mine-${transport}`;
      const first = await baton.submit("baton/echo", { text: "a" }, { requestId });
      assert.equal((await baton.submit("baton/echo", { text: "a" }, { requestId })).id, first.id);
      await assert.rejects(baton.submit("baton/echo", { text: "b" }, { requestId }), (error) => {
        assert.ok(error instanceof node.ConflictError);
        assert.equal(error.reason, "REQUEST_ID_REUSED");
        assert.equal(error.metadata["task_id"], first.id);
        assert.ok(error.correlationId);
        return true;
      });
    });

    test("errors name family, reason and field", async () => {
      const missing = "01900000-0000-7000-8000-000000000000";
      await assert.rejects(baton.get(missing), { name: "NotFoundError", reason: "NOT_FOUND", code: "NOT_FOUND" });
      await assert.rejects(all(baton.stream(missing)), { name: "NotFoundError", reason: "NOT_FOUND" });
      await assert.rejects(all(baton.run("no slash", {})), (error) => {
        assert.ok(error instanceof node.InvalidRequestError);
        assert.equal(error.violations[0]?.field, "spec.model");
        return true;
      });
      const waiting = await baton.submit("nobody/serves-this", {});
      await assert.rejects(waiting.delete(), { name: "PreconditionError", reason: "STATE_CONFLICT" });
      await waiting.cancel();
      await waiting.delete();
      await assert.rejects(waiting.get(), { reason: "NOT_FOUND" });
    });

    test("a cancelled task ends its stream, and its result is an error", async () => {
      const task = await baton.submit("baton/ngram", PROMPT, slow(100_000, 50));
      const stream = task.tokens();
      let n = 0;
      for await (const _ of stream) if ((n += 1) === 3) await task.cancel("enough");
      for (const source of [stream, task]) {
        await assert.rejects(source.result(), (error) => {
          assert.ok(error instanceof node.TaskCancelledError);
          assert.equal(error.reason, "CANCELLED");
          assert.equal(error.taskId, task.id);
          return true;
        });
      }
      assert.equal((await task.retry()).id === task.id, false);
    });

    test("a task that fails says why", async () => {
      const task = await baton.submit("baton/ngram", PROMPT, { params: { temperature: -1 } });
      await assert.rejects(task.result(), { name: "TaskFailedError", reason: "INPUT_REJECTED" });
      const late = await baton.submit("nobody/serves-this", {}, { startTimeout: "50ms" });
      await assert.rejects(late.result(), { name: "TaskExpiredError", reason: "START_TIMEOUT" });
    });

    test("a run that is left is cancelled, and one that is to be kept goes on", async () => {
      for (const [onDisconnect, state] of [
        ["cancel", TaskState.CANCELLED],
        ["keep", TaskState.RUNNING],
      ] as const) {
        const run = baton.run("baton/ngram", PROMPT, { ...slow(100_000, 50), onDisconnect });
        for await (const _ of run) break;
        assert.equal((await baton.get(run.taskId ?? "")).state, state);
        await baton.cancel(run.taskId ?? "");
      }
    });

    test("an abort ends a stream with its reason, and the task goes on", async () => {
      const task = await baton.submit("baton/ngram", PROMPT, slow(100, 0.5));
      const abort = new AbortController();
      const reason = new Error("the user left the page");
      const reading = task.tokens({ signal: abort.signal })[Symbol.asyncIterator]();
      assert.equal((await reading.next()).done, false);
      const next = reading.next();
      abort.abort(reason);
      await assert.rejects(next, reason);
      assert.equal((await task.get()).state, TaskState.RUNNING);
      await task.cancel();
    });

    test("a server that says nothing is a timeout, and one that is not there a lost connection", async () => {
      const taken: Socket[] = [];
      const silent = createServer((socket) => taken.push(socket)).listen(0, "127.0.0.1");
      await once(silent, "listening");
      const { port } = silent.address() as AddressInfo;
      for (const [at, reason] of [
        [port, "CALL_DEADLINE"],
        [await freePort(), "CONNECTION_LOST"],
      ] as const) {
        const baton = connect({ url: `http://127.0.0.1:${at}` });
        await assert.rejects(baton.get("x", { timeout: "300ms" }), { reason });
        baton.close();
      }
      silent.close();
      for (const socket of taken) socket.destroy();
    });

    test("a process that left its streams ends by itself", async () => {
      const entry = join(import.meta.dirname, "../src", transport === "gRPC" ? "node.js" : "browser.js");
      // The end of such a task is on its way when the reader leaves.
      const program = `
        import { Baton } from ${JSON.stringify(entry)};
        const baton = new Baton({ url: ${JSON.stringify(server.url)} });
        for (let n = 0; n < 40; n += 1) {
          const task = await baton.submit("baton/ngram", { prompt: "x" }, { params: { max_tokens: 30 } });
          for await (const token of task.tokens()) if (token.index === 9n) break;
        }
        console.log("left");`;
      const args = ["--input-type=module", "--eval", program];
      const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: SOON });
      assert.equal(stdout, "left\n");
    });

    test("a client that is closed ends its streams, and makes no more calls", async () => {
      const task = await baton.submit("nobody/serves-this", {});
      const own = connect({ url: server.url });
      const events = own.stream(task.id).events();
      await events.next();
      const next = events.next();
      own.close();
      await assert.rejects(next, { reason: "CLIENT_CLOSED" });
      await assert.rejects(own.get(task.id), { reason: "CLIENT_CLOSED" });
      await task.cancel();
    });

    test("lists come page by page, by filter", async () => {
      const labels = { "list/of": `${transport} & more=yes` };
      const ids: string[] = [];
      for (let n = 0; n < 5; n += 1) ids.unshift((await baton.submit("baton/echo", { text: `${n}` }, { labels })).id);
      const listed = await all(baton.list({ labels, pageSize: 2, createdAfter: new Date(Date.now() - 60_000) }));
      assert.deepEqual(listed.map(({ taskId }) => taskId), ids);
      const states = [TaskState.FAILED, TaskState.CANCELLED];
      assert.deepEqual(await all(baton.list({ labels, states })), []);
    });

    test("several tasks share one stream", async () => {
      const tasks = await Promise.all(["a", "b c", "d e f"].map((text) => baton.submit("baton/echo", { text })));
      const events = await all(baton.streamMany(tasks.map(({ id }) => id)));
      for (const { id } of tasks) {
        const own = events.filter(({ taskId }) => taskId === id);
        assert.deepEqual(sequences(own), own.map((_, at) => at + 1));
        assert.equal(own.at(-1)?.body.case, "ended");
      }
    });

    test("a watch tells of other tasks", async () => {
      const labels = { watched: transport };
      const watch = baton.watch({ labels });
      const first = watch.next();
      // The watch begins when the server says so; a task now and then meets it.
      const submits: node.TaskHandle[] = [];
      const met = await eventually("a watched event", async () => {
        submits.push(await baton.submit("baton/echo", { text: "x" }, { labels }));
        return Promise.race([first, new Promise<undefined>((resolve) => setTimeout(resolve, 50))]);
      });
      assert.ok(!met.done && submits.some(({ id }) => id === met.value.taskId));
      await watch.return();
    });

    test("more than a hundred streams run at once", async () => {
      const task = await baton.submit("nobody/serves-this", {});
      const streams = Array.from({ length: 150 }, () => task.events());
      const firsts = await Promise.all(streams.map((stream) => stream.next()));
      assert.ok(firsts.every((first) => !first.done && first.value.body.case === "queued"));
      const rest = streams.map((stream) => stream.next());
      await task.cancel();
      assert.ok((await Promise.all(rest)).every((last) => !last.done && last.value.body.case === "ended"));
    });

    test("services of the contract are functions", async () => {
      const queues = baton.service(node.QueueService);
      const paused = await queues.pauseQueue({ model: `paused/${transport.toLowerCase()}`, reason: "test" });
      assert.equal(paused.pause?.reason, "test");
      const task = await baton.submit(paused.model, {});
      assert.match((await task.explain()).summary, /paused/);
      await task.cancel();
    });
  });
}

for (const [transport, connect] of Object.entries(CLIENTS)) {
  describe(`${transport}, with credentials`, { timeout: 120_000 }, () => {
    let server: Server;
    before(async () => (server = await Server.start(["--auth"])));
    after(() => server.stop());

    test("keys and tokens open what they are for", async () => {
      const { url } = server;
      const nobody = connect({ url });
      await assert.rejects(nobody.get("x"), { name: "UnauthenticatedError", reason: "UNAUTHENTICATED" });
      await assert.rejects(connect({ url, key: "bt_no_such" }).get("x"), { name: "UnauthenticatedError" });
      const admin = connect({ url, key: server.key() });
      const [mine, other] = [await admin.submit("baton/echo", { text: "mine" }), await admin.submit("baton/echo", { text: "x" })];
      const { token, expireTime } = await admin.issueToken(mine.id, { ttl: "2m" });
      assert.ok(expireTime !== undefined && expireTime.getTime() > Date.now());
      let asked = 0;
      const reader = connect({ url, key: async () => ((asked += 1), token) });
      assert.equal((await all(reader.stream(mine.id))).map(({ text }) => text).join(""), "mine");
      assert.ok(asked > 0);
      await assert.rejects(all(reader.stream(other.id)), (error) => error instanceof node.BatonError && /NOT_FOUND|PERMISSION/.test(error.reason));
      await assert.rejects(reader.submit("baton/echo", {}), { name: "PermissionDeniedError" });
    });
  });

  describe(`${transport}, while the server comes and goes`, { timeout: 180_000 }, () => {
    let server: Server;
    before(async () => (server = await Server.withRunner()));
    after(() => server.stop());

    for (const signal of ["SIGKILL", "SIGTERM"] as const) {
      test(`a stream over a server that gets ${signal} has each token once, and all of them`, async () => {
        const baton = connect({ url: server.url });
        const whole = await (await baton.submit("baton/ngram", PROMPT, { seed: 8, params: { max_tokens: 300 } })).result();
        const task = await baton.submit("baton/ngram", PROMPT, slow(300, 100));
        const reconnects: string[] = [];
        const stream = task.tokens({ onReconnect: ({ error }) => reconnects.push(error.reason) });
        const tokens: node.Token[] = [];
        let restarted: Promise<void> | undefined;
        for await (const token of stream) {
          tokens.push(token);
          if (tokens.length === 60) restarted = server.kill(signal).then(() => server.start());
        }
        await restarted;
        assert.ok(reconnects.length > 0, "the stream never broke");
        assert.equal(tokens.map(({ text }) => text).join(""), whole.text);
        assert.deepEqual(tokens.map(({ index }) => Number(index)), [...Array(300).keys()]);
        assert.ok(tokens.every(({ attempt, restart }) => attempt === 1 && !restart));
        assert.equal((await stream.result()).text, whole.text);
        baton.close();
      });
    }

    test("a submit to a server that is down is accepted once it is up", async () => {
      const baton = connect({ url: server.url });
      await server.kill();
      const submitted = baton.submit("baton/ngram", PROMPT, { params: { max_tokens: 5 }, timeout: "60s" });
      await server.start();
      const task = await submitted;
      assert.equal((await task.result()).usage?.tokensOut, 5n);
      assert.equal((await all(baton.list({ model: "baton/ngram" }))).filter(({ taskId }) => taskId === task.id).length, 1);
      baton.close();
    });
  });
}
