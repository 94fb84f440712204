// Claims about single parts: waits, server-sent events, HTTP requests, errors.

import assert from "node:assert/strict";
import { test } from "node:test";

import { create, toBinary, type JsonObject } from "@bufbuild/protobuf";

import * as errors from "../src/errors.js";
import { ErrorReason } from "../src/gen/baton/v1/errors_pb.js";
import { TaskState } from "../src/gen/baton/v1/events_pb.js";
import { QueueService } from "../src/gen/baton/v1/queues_pb.js";
import { ListTasksRequestSchema, StreamTaskRequestSchema, TaskService } from "../src/gen/baton/v1/tasks_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { httpRequest } from "../src/http-rule.js";
import { SseDecoder, type ServerSentEvent } from "../src/sse.js";
import { backoffMs, durationOf, spanMs, type TimeSpan } from "../src/time.js";
import { FakeClock } from "./support.js";

test("waits are anything up to a bound that doubles to its limit", () => {
  const clock = new FakeClock();
  clock.chance = 0.999;
  assert.deepEqual(
    [0, 1, 2, 3, 4, 5, 6, 60].map((n) => Math.round(backoffMs(clock, n))),
    [100, 200, 400, 799, 1598, 3197, 4995, 4995],
  );
  clock.chance = 0;
  assert.equal(backoffMs(clock, 9), 0);
});

test("nobody comes back before the server's time", () => {
  const clock = new FakeClock();
  for (const chance of [0, 0.5, 0.999]) {
    clock.chance = chance;
    assert.ok(backoffMs(clock, 3, 2_000) >= 2_000);
  }
});

test("lengths of time are milliseconds or texts, and others are refused by name", () => {
  assert.deepEqual(["500ms", "1.5s", "2m", "1h", "7d", 20].map((span) => spanMs("x", span as TimeSpan)), [
    500, 1_500, 120_000, 3_600_000, 604_800_000, 20,
  ]);
  for (const wrong of ["2 m", "-1s", "soon", NaN, -1, Infinity]) {
    assert.throws(() => spanMs("deadline", wrong as TimeSpan), /^InvalidRequestError: deadline is /);
  }
  const { seconds, nanos } = durationOf("x", "1500ms");
  assert.deepEqual([seconds, nanos], [1n, 500_000_000]);
});

const STREAM = "retry: 2000\r\n\r\n: comment\nid: 1\nevent: token\ndata: {\"a\": \"é€😀\"}\n\ndata\ndata:  two\r\rid: 2\0\nevent: x\n\ndata: la\r\ndata: st\r\n\r\n";
const READ: ServerSentEvent[] = [
  { event: "token", data: '{"a": "é€😀"}', id: "1" },
  { event: "message", data: "\n two", id: "1" },
  { event: "message", data: "la\nst", id: "1" },
];

test("server-sent events are read however the stream is cut", () => {
  const bytes = new TextEncoder().encode(`\u{feff}${STREAM}data: never ended`);
  for (let first = 0; first <= bytes.length; first += 1) {
    for (const second of [first, Math.min(first + 1, bytes.length), bytes.length]) {
      const decoder = new SseDecoder();
      const pieces = [bytes.subarray(0, first), bytes.subarray(first, second), bytes.subarray(second)];
      assert.deepEqual(pieces.flatMap((piece) => decoder.push(piece)), READ, `cut at ${first} and ${second}`);
    }
  }
});

test("a request becomes path, query and body as its annotation says", () => {
  const { getTask, cancelTask, listTasks, streamTask, submitTask, deleteTask } = TaskService.method;
  const { getQueue, pauseQueue } = QueueService.method;
  const request = (method: Parameters<typeof httpRequest>[0], fields: object) => {
    const { method: verb, target, body } = httpRequest(method, create(method.input, fields as never));
    return `${verb} ${target}${body === undefined ? "" : ` ${body}`}`;
  };
  assert.equal(request(getTask, { taskId: "a/b c?é" }), "GET /v1/tasks/a%2Fb%20c%3F%C3%A9");
  assert.equal(request(deleteTask, { taskId: "t" }), "DELETE /v1/tasks/t");
  assert.equal(request(cancelTask, { taskId: "t", reason: "r" }), 'POST /v1/tasks/t/cancel {"reason":"r"}');
  assert.equal(request(submitTask, { requestId: "i" }), 'POST /v1/tasks {"requestId":"i"}');
  assert.equal(request(getQueue, { model: "own er/name" }), "GET /v1/queues/own%20er/name");
  assert.equal(request(pauseQueue, { model: "a/b" }), "POST /v1/queues/a/b:pause {}");
  assert.equal(request(streamTask, { taskId: "t", fromSequence: 7n }), "GET /v1/tasks/t/stream?fromSequence=7");
  assert.equal(
    request(streamTask, create(StreamTaskRequestSchema, { taskId: "t", others: [{ taskId: "u", afterSequence: 3n }] })),
    'POST /v1/tasks:stream {"taskId":"t","others":[{"taskId":"u","afterSequence":"3"}]}',
  );
  const list = create(ListTasksRequestSchema, {
    states: [TaskState.QUEUED, TaskState.RUNNING],
    labels: { "a&b": "c=d" },
    createdAfter: { seconds: 1n },
  });
  assert.equal(
    decodeURIComponent(request(listTasks, list)),
    "GET /v1/tasks?states=TASK_STATE_QUEUED&states=TASK_STATE_RUNNING&labels[a&b]=c=d&createdAfter=1970-01-01T00:00:01Z",
  );
  assert.throws(() => request(getTask, {}), /^InvalidRequestError: task_id must not be empty/);
});

test("an error is the same from binary and from JSON details", () => {
  const parts = [
    [ErrorInfoSchema, { reason: "QUEUE_FULL", domain: "baton", metadata: { limit: "10" } }],
    [BadRequestSchema, { fieldViolations: [{ field: "spec.model", description: "is odd" }] }],
    [RetryInfoSchema, { retryDelay: "1.500s" }],
  ] as const;
  const asJson = parts.map(([schema, value]) => ({ type: schema.typeName, value: value as JsonObject }));
  const asBinary = [
    { type: ErrorInfoSchema.typeName, value: toBinary(ErrorInfoSchema, create(ErrorInfoSchema, parts[0][1])) },
    {
      type: BadRequestSchema.typeName,
      value: toBinary(BadRequestSchema, create(BadRequestSchema, { fieldViolations: [...parts[1][1].fieldViolations] })),
    },
    {
      type: RetryInfoSchema.typeName,
      value: toBinary(RetryInfoSchema, create(RetryInfoSchema, { retryDelay: { seconds: 1n, nanos: 500_000_000 } })),
    },
  ];
  for (const details of [asJson, asBinary]) {
    const error = errors.errorOfStatus(8, "full", details, "c-1");
    assert.ok(error instanceof errors.OverloadedError);
    assert.equal(String(error), "OverloadedError: full");
    assert.deepEqual(
      [error.code, error.reason, error.retryAfterMs, error.correlationId, error.metadata["limit"]],
      ["RESOURCE_EXHAUSTED", "QUEUE_FULL", 1_500, "c-1", "10"],
    );
    assert.deepEqual(error.violations, [{ field: "spec.model", description: "is odd" }]);
    assert.ok(errors.isTransient(error));
  }
});

test("each family has its class, and what no server wrote is a lost connection", () => {
  const info = (reason: string) => [{ type: ErrorInfoSchema.typeName, value: { reason, domain: "baton" } }];
  const families = {
    3: errors.InvalidRequestError,
    4: errors.CallTimeoutError,
    5: errors.NotFoundError,
    6: errors.ConflictError,
    7: errors.PermissionDeniedError,
    8: errors.OverloadedError,
    9: errors.PreconditionError,
    10: errors.ConflictError,
    11: errors.OutOfRangeError,
    12: errors.UnimplementedError,
    13: errors.InternalError,
    14: errors.UnavailableError,
    16: errors.UnauthenticatedError,
  };
  for (const [code, family] of Object.entries(families)) {
    const error = errors.errorOfStatus(Number(code), "m", info("SOME_NEW_REASON"));
    assert.equal(error.constructor, family);
    assert.equal(error.reason, "SOME_NEW_REASON");
  }
  assert.ok(!errors.isTransient(errors.errorOfStatus(13, "defect", info("INTERNAL"))));
  assert.ok(!errors.isTransient(errors.errorOfStatus(8, "too large", info("MESSAGE_TOO_LARGE"))));
  for (const code of [1, 2, 10, 13, 14, 15]) {
    const error = errors.errorOfStatus(code, "broken pipe", []);
    assert.equal(error.reason, "CONNECTION_LOST");
    assert.ok(errors.isTransient(error));
  }
  assert.equal(errors.errorOfStatus(12, "no such page", []).reason, "UNKNOWN");
  const foreign = [{ type: ErrorInfoSchema.typeName, value: { reason: "QUOTA", domain: "proxy.example" } }];
  assert.equal(errors.errorOfStatus(8, "slow down", foreign).reason, "UNKNOWN");
});

test("reasons are the contract's", () => {
  // Compiles only as long as the type follows the enum.
  const reasons: errors.Reason[] = ["QUEUE_FULL", "LEASE_LOST", "REQUEST_ID_REUSED"];
  for (const reason of reasons) assert.ok(reason in ErrorReason);
});

test("each end of a task has its class", () => {
  const ends = [
    [TaskState.FAILED, errors.TaskFailedError],
    [TaskState.CANCELLED, errors.TaskCancelledError],
    [TaskState.EXPIRED, errors.TaskExpiredError],
    [TaskState.DEAD_LETTERED, errors.TaskDeadLetteredError],
  ] as const;
  for (const [state, family] of ends) {
    const error = errors.taskErrorOf("t", state, undefined);
    assert.equal(error.constructor, family);
    assert.ok(error instanceof errors.TaskEndedError && error.taskId === "t" && error.state === state);
    assert.ok(!errors.isTransient(error));
  }
});
