// What runs in the page of connect.test.ts: Connect's own browser client, on the generated code alone.

import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { Baton, NotFoundError } from "../src/browser.js";
import { TaskState } from "../src/gen/baton/v1/events_pb.js";
import { TaskService } from "../src/gen/baton/v1/tasks_pb.js";
import { BadRequestSchema, ErrorInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";

/** The flows, by name; each returns what the test looks at. */
export type Flows = typeof flows;

const tasks = (url: string) => createClient(TaskService, createGrpcWebTransport({ baseUrl: url }));

const flows = {
  /** Submits twice under one request id, follows to the end, reads the result. */
  async submit(url: string) {
    const client = tasks(url);
    const spec = { model: "baton/ngram", input: { prompt: "Alice was" }, params: { max_tokens: 50 }, seed: 8n };
    const { task } = await client.submitTask({ spec, requestId: "connect-web" });
    const again = await client.submitTask({ spec, requestId: "connect-web" });
    const taskId = task?.taskId ?? "";
    const sequences: number[] = [];
    let text = "";
    let end: string | undefined;
    for await (const { sequence, body } of client.streamTask({ taskId })) {
      sequences.push(Number(sequence));
      if (body.case === "token") text += body.value.text;
      if (body.case === "ended") end = TaskState[body.value.state];
    }
    const result = await client.getTaskResult({ taskId });
    return { same: again.task?.taskId === taskId, sequences, text, end, result: result.text };
  },

  /** Runs a task, cancels it after some tokens, and reads on. */
  async cancel(url: string) {
    const client = tasks(url);
    const spec = { model: "baton/ngram", input: { prompt: "x" }, params: { max_tokens: 100_000, tokens_per_second: 50 } };
    let taskId = "";
    let n = 0;
    for await (const { body } of client.runTask({ spec })) {
      if (body.case === "queued") taskId = body.value.taskId;
      if (body.case === "token" && (n += 1) === 3) await client.cancelTask({ taskId, reason: "enough" });
      if (body.case === "ended") return { end: TaskState[body.value.state], reason: body.value.error?.reason };
    }
    return undefined;
  },

  /** Leaves a run in the middle; tells its task. */
  async leave(url: string) {
    const leave = new AbortController();
    const spec = { model: "baton/ngram", input: { prompt: "x" }, params: { max_tokens: 100_000, tokens_per_second: 50 } };
    let taskId = "";
    try {
      for await (const { body } of tasks(url).runTask({ spec }, { signal: leave.signal })) {
        if (body.case === "queued") taskId = body.value.taskId;
        if (body.case === "token") leave.abort();
      }
    } catch (error) {
      return { taskId, code: Code[ConnectError.from(error).code] };
    }
    return undefined;
  },

  /** The typed details of refusals, unary and streaming. */
  async errors(url: string) {
    const client = tasks(url);
    const taskId = "01900000-0000-7000-8000-000000000000";
    const failures = [
      () => client.getTask({ taskId }),
      () => client.submitTask({ spec: { model: "no slash" } }),
      async () => {
        for await (const _ of client.streamTask({ taskId }));
      },
      () => client.submitTask({ spec: { model: "a/b" } }, { timeoutMs: 0.001 }),
    ];
    const found: unknown[] = [];
    for (const fail of failures) {
      try {
        await fail();
        found.push([]);
      } catch (reason) {
        const error = ConnectError.from(reason);
        const [info] = error.findDetails(ErrorInfoSchema);
        const [request] = error.findDetails(BadRequestSchema);
        found.push([Code[error.code], info?.reason, request?.fieldViolations[0]?.field]);
      }
    }
    return found;
  },

  /** Our own client over fetch: a run to its end, and a refusal. */
  async ours(url: string) {
    const baton = new Baton({ url });
    const run = baton.run("baton/echo", { text: "over fetch and TLS" });
    let text = "";
    for await (const token of run) text += token.text;
    const result = await run.result();
    const refused = await baton.get("nothing").then(
      () => undefined,
      (error: unknown) => error instanceof NotFoundError && error.reason,
    );
    return { text, result: result.text, refused };
  },

  /** The state of a task. */
  async state(url: string, taskId: string) {
    return TaskState[(await tasks(url).getTask({ taskId })).state];
  },
};

Object.assign(globalThis, { flows });
