// What can go wrong: one class per family, one reason per cause.

import { fromBinary, fromJson, isMessage, type JsonObject } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";

import type { ErrorReason } from "./gen/baton/v1/errors_pb.js";
import { TaskState, type TaskError } from "./gen/baton/v1/events_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** Canonical gRPC codes by number. */
const CODES = [
  "OK",
  "CANCELLED",
  "UNKNOWN",
  "INVALID_ARGUMENT",
  "DEADLINE_EXCEEDED",
  "NOT_FOUND",
  "ALREADY_EXISTS",
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "FAILED_PRECONDITION",
  "ABORTED",
  "OUT_OF_RANGE",
  "UNIMPLEMENTED",
  "INTERNAL",
  "UNAVAILABLE",
  "DATA_LOSS",
  "UNAUTHENTICATED",
] as const;

/** Name of a canonical gRPC code. */
export type Code = Exclude<(typeof CODES)[number], "OK">;

/**
 * Why a call or a task failed. Names of the server are those of `ErrorReason`
 * in the contract, and a newer server may have more. Made by the client:
 * `CONNECTION_LOST` (no answer, or it broke off), `KEY_UNAVAILABLE` (the function
 * that gets the key failed), `STREAM_GAP` (tokens are lost for good),
 * `CLIENT_CLOSED` (by `close`), `UNKNOWN` (an answer that is not Baton's, such as
 * a proxy's).
 */
export type Reason =
  | Exclude<keyof typeof ErrorReason, "UNSPECIFIED">
  | "CONNECTION_LOST"
  | "KEY_UNAVAILABLE"
  | "STREAM_GAP"
  | "CLIENT_CLOSED"
  | "UNKNOWN"
  | (string & {});

/** A field of the request that is malformed. */
export interface Violation {
  /** Path of the field, such as `spec.model`. */
  field: string;
  /** What is wrong with it. */
  description: string;
}

/** Everything that an error may carry. */
export interface ErrorFacts {
  /** Canonical gRPC code. */
  code: Code;
  /** Why. */
  reason: Reason;
  /** One line for people. */
  message: string;
  /** Facts, as the reason documents them. */
  metadata?: Readonly<Record<string, string>>;
  /** Malformed fields. */
  violations?: readonly Violation[];
  /** Milliseconds after which a repetition makes sense. */
  retryAfterMs?: number | undefined;
  /** Finds the call in the server's log. */
  correlationId?: string | undefined;
  /** What was caught. */
  cause?: unknown;
}

/** Base of all errors of this package. */
export class BatonError extends Error {
  override readonly name: string = "BatonError";
  /** Canonical gRPC code. */
  readonly code: Code;
  /** Why: match on this. */
  readonly reason: Reason;
  /** Facts, as the reason documents them. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Malformed fields of the request. */
  readonly violations: readonly Violation[];
  /** Milliseconds after which a repetition makes sense; unset when none does. */
  readonly retryAfterMs: number | undefined;
  /** Finds the call in the server's log; unset when no server answered. */
  readonly correlationId: string | undefined;

  /** Made by the client; use {@link errorOf} to get the family that fits. */
  constructor(facts: ErrorFacts) {
    super(facts.message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.code = facts.code;
    this.reason = facts.reason;
    this.metadata = facts.metadata ?? {};
    this.violations = facts.violations ?? [];
    this.retryAfterMs = facts.retryAfterMs;
    this.correlationId = facts.correlationId;
  }
}

/** The request is malformed: `violations` name the fields. INVALID_ARGUMENT. */
export class InvalidRequestError extends BatonError {
  override readonly name = "InvalidRequestError";
}

/** The credential is missing, expired or revoked. UNAUTHENTICATED. */
export class UnauthenticatedError extends BatonError {
  override readonly name = "UnauthenticatedError";
}

/** The credential lacks a scope: `metadata.scope`. PERMISSION_DENIED. */
export class PermissionDeniedError extends BatonError {
  override readonly name = "PermissionDeniedError";
}

/** The named thing does not exist. NOT_FOUND. */
export class NotFoundError extends BatonError {
  override readonly name = "NotFoundError";
}

/** It exists already, or changed meanwhile. ALREADY_EXISTS, ABORTED. */
export class ConflictError extends BatonError {
  override readonly name = "ConflictError";
}

/** The thing is in the wrong state for the call. FAILED_PRECONDITION. */
export class PreconditionError extends BatonError {
  override readonly name = "PreconditionError";
}

/** The wanted part of a stream is not there. OUT_OF_RANGE. */
export class OutOfRangeError extends BatonError {
  override readonly name = "OutOfRangeError";
}

/** Refused for now, to protect the service. RESOURCE_EXHAUSTED. */
export class OverloadedError extends BatonError {
  override readonly name = "OverloadedError";
}

/** Nobody can answer now, the connection broke, or there is no key. UNAVAILABLE. */
export class UnavailableError extends BatonError {
  override readonly name = "UnavailableError";
}

/** The time of the call passed; what it asked for may go on. DEADLINE_EXCEEDED. */
export class CallTimeoutError extends BatonError {
  override readonly name = "CallTimeoutError";
}

/** The server does not have the method. UNIMPLEMENTED. */
export class UnimplementedError extends BatonError {
  override readonly name = "UnimplementedError";
}

/** The server failed, or sent what cannot be. INTERNAL and the rest. */
export class InternalError extends BatonError {
  override readonly name = "InternalError";
}

/** Tokens of a stream are lost for good; read on from `nextSequence`. */
export class StreamGapError extends BatonError {
  override readonly name = "StreamGapError";

  /** Made by a stream that meets a `gap`. */
  constructor(
    /** First lost position. */
    readonly firstSequence: bigint,
    /** First position after the gap. */
    readonly nextSequence: bigint,
    why: string,
  ) {
    const range = `${firstSequence} to ${nextSequence - 1n}`;
    super({ code: "DATA_LOSS", reason: "STREAM_GAP", message: `events ${range} are lost: ${why}` });
  }
}

/** Base of the errors of tasks that ended without a result. */
export class TaskEndedError extends BatonError {
  override readonly name: string = "TaskEndedError";

  /** Made from the end of a task; use {@link taskErrorOf}. */
  constructor(
    /** The task. */
    readonly taskId: string,
    /** Its final state. */
    readonly state: TaskState,
    facts: ErrorFacts,
  ) {
    super(facts);
  }
}

/** The task FAILED: `reason` and `message` are those of its last attempt. */
export class TaskFailedError extends TaskEndedError {
  override readonly name = "TaskFailedError";
}

/** The task was cancelled. */
export class TaskCancelledError extends TaskEndedError {
  override readonly name = "TaskCancelledError";
}

/** The task's deadline or start timeout passed. */
export class TaskExpiredError extends TaskEndedError {
  override readonly name = "TaskExpiredError";
}

/** The task's attempts are used up; an operator can redrive it. */
export class TaskDeadLetteredError extends TaskEndedError {
  override readonly name = "TaskDeadLetteredError";
}

const FAMILIES: Partial<Record<Code, new (facts: ErrorFacts) => BatonError>> = {
  INVALID_ARGUMENT: InvalidRequestError,
  UNAUTHENTICATED: UnauthenticatedError,
  PERMISSION_DENIED: PermissionDeniedError,
  NOT_FOUND: NotFoundError,
  ALREADY_EXISTS: ConflictError,
  ABORTED: ConflictError,
  FAILED_PRECONDITION: PreconditionError,
  OUT_OF_RANGE: OutOfRangeError,
  RESOURCE_EXHAUSTED: OverloadedError,
  UNAVAILABLE: UnavailableError,
  DEADLINE_EXCEEDED: CallTimeoutError,
  UNIMPLEMENTED: UnimplementedError,
};

/** The error of the family that fits its code. */
export function errorOf(facts: ErrorFacts): BatonError {
  return new (FAMILIES[facts.code] ?? InternalError)(facts);
}

/** The error of a task that ended in `state` without a result. */
export function taskErrorOf(taskId: string, state: TaskState, error: TaskError | undefined): TaskEndedError {
  const facts = (code: Code, reason: Reason, message: string): ErrorFacts => ({
    code,
    reason: error?.reason || reason,
    message: error?.message || message,
    metadata: error?.metadata ?? {},
  });
  switch (state) {
    case TaskState.CANCELLED:
      return new TaskCancelledError(taskId, state, facts("CANCELLED", "CANCELLED", "the task was cancelled"));
    case TaskState.EXPIRED:
      return new TaskExpiredError(
        taskId,
        state,
        facts("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "the task did not end in time"),
      );
    case TaskState.DEAD_LETTERED:
      return new TaskDeadLetteredError(
        taskId,
        state,
        facts("FAILED_PRECONDITION", "TASK_FAILED", "the attempts of the task are used up"),
      );
    default:
      return new TaskFailedError(taskId, state, facts("FAILED_PRECONDITION", "TASK_FAILED", "the task failed"));
  }
}

/** A detail of a `google.rpc.Status`, as binary or as JSON. */
export interface Detail {
  /** Full name of its type. */
  type: string;
  /** The encoded message, or its JSON without `@type`. */
  value: Uint8Array | JsonObject;
}

/** The error that a status stands for. */
export function errorOfStatus(
  code: number,
  message: string,
  details: readonly Detail[],
  correlationId?: string,
  cause?: unknown,
): BatonError {
  const name = CODES[code];
  let facts: ErrorFacts = {
    code: name === undefined || name === "OK" ? "UNKNOWN" : name,
    reason: "UNKNOWN",
    message,
    correlationId,
    cause,
  };
  let isOurs = false;
  for (const detail of details) {
    const message = readDetail(detail);
    if (message === undefined) continue;
    if (isMessage(message, ErrorInfoSchema) && message.domain === "baton") {
      isOurs = true;
      facts = { ...facts, reason: message.reason, metadata: message.metadata };
    } else if (isMessage(message, BadRequestSchema)) {
      const violations = message.fieldViolations.map(({ field, description }) => ({ field, description }));
      facts = { ...facts, violations };
    } else if (isMessage(message, RetryInfoSchema) && message.retryDelay) {
      facts = { ...facts, retryAfterMs: durationMs(message.retryDelay) };
    }
  }
  return isOurs ? errorOf(facts) : foreign(facts);
}

/** Every error of a server has a reason. Without one the connection broke, or something between failed. */
function foreign(facts: ErrorFacts): BatonError {
  switch (facts.code) {
    case "UNAVAILABLE":
    case "UNKNOWN":
    case "INTERNAL":
    case "CANCELLED":
    case "ABORTED":
    case "DATA_LOSS":
      return errorOf({ ...facts, code: "UNAVAILABLE", reason: "CONNECTION_LOST" });
    case "DEADLINE_EXCEEDED":
      return errorOf({ ...facts, reason: "CALL_DEADLINE" });
    default:
      return errorOf(facts);
  }
}

const DETAILS = [ErrorInfoSchema, BadRequestSchema, RetryInfoSchema] as const;

function readDetail(detail: Detail) {
  const schema = DETAILS.find((schema) => schema.typeName === detail.type);
  if (schema === undefined) return undefined;
  try {
    return detail.value instanceof Uint8Array
      ? fromBinary(schema, detail.value)
      : fromJson(schema, detail.value, { ignoreUnknownFields: true });
  } catch {
    // What something between server and client wrote is not worth more than its code.
    return undefined;
  }
}

/** The connection broke, or there never was one. */
export function connectionLost(message: string, cause?: unknown): BatonError {
  return errorOf({ code: "UNAVAILABLE", reason: "CONNECTION_LOST", message, cause });
}

/** `close` was called. */
export function clientClosed(): BatonError {
  return errorOf({ code: "FAILED_PRECONDITION", reason: "CLIENT_CLOSED", message: "the client was closed" });
}

/** The function that gets the key failed. Networks fail together, so that it may work soon. */
export function keyUnavailable(cause: unknown): BatonError {
  const message = `cannot get the key: ${cause instanceof Error ? cause.message : String(cause)}`;
  return errorOf({ code: "UNAVAILABLE", reason: "KEY_UNAVAILABLE", message, cause });
}

/** The time of a call passed. */
export function callTimedOut(ms: number): BatonError {
  return errorOf({ code: "DEADLINE_EXCEEDED", reason: "CALL_DEADLINE", message: `no answer within ${ms} ms` });
}

/** Something that the caller gave is malformed. */
export function invalid(field: string, description: string): BatonError {
  return errorOf({
    code: "INVALID_ARGUMENT",
    reason: "INVALID_PARAMS",
    message: `${field} ${description}`,
    violations: [{ field, description }],
  });
}

/** Whether repeating what failed so may help: nobody could answer, or the server said when. */
export function isTransient(error: unknown): error is BatonError {
  if (error instanceof TaskEndedError) return false;
  return (
    error instanceof UnavailableError || (error instanceof OverloadedError && error.retryAfterMs !== undefined)
  );
}
