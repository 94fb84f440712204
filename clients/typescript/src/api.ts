// What both entries export.

export {
  BatonClient,
  TaskHandle,
  type BatonOptions,
  type ListFilter,
  type RunOptions,
  type SubmitOptions,
  type TaskOptions,
  type TaskStreamOptions,
  type WatchFilter,
} from "./client.js";
export type { CallOptions, Credential, ServiceClient } from "./calls.js";
export type { FollowOptions, Reconnect, StreamOptions } from "./follow.js";
export { TaskStream, type Result, type Token } from "./stream.js";
export type { TimeSpan } from "./time.js";
export {
  BatonError,
  CallTimeoutError,
  ConflictError,
  InternalError,
  InvalidRequestError,
  NotFoundError,
  OutOfRangeError,
  OverloadedError,
  PermissionDeniedError,
  PreconditionError,
  StreamGapError,
  TaskCancelledError,
  TaskDeadLetteredError,
  TaskEndedError,
  TaskExpiredError,
  TaskFailedError,
  UnauthenticatedError,
  UnavailableError,
  UnimplementedError,
  isTransient,
  type Code,
  type ErrorFacts,
  type Reason,
  type Violation,
} from "./errors.js";
export * from "./gen/baton/v1/events_pb.js";
export * from "./gen/baton/v1/keys_pb.js";
export * from "./gen/baton/v1/queues_pb.js";
export * from "./gen/baton/v1/tasks_pb.js";
export { RunnerService } from "./gen/baton/v1/runners_pb.js";
