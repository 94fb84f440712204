// Events of tasks over any number of connections: each sequence once, in order.

import { create, type MessageInitShape } from "@bufbuild/protobuf";

import { newRequestId, type Calls } from "./calls.js";
import { connectionLost, isTransient, UnauthenticatedError, type BatonError } from "./errors.js";
import type { TaskEvent } from "./gen/baton/v1/events_pb.js";
import { RunTaskRequestSchema, TaskService, type StreamTaskRequestSchema } from "./gen/baton/v1/tasks_pb.js";
import { backoffMs, sleep, spanMs, type TimeSpan } from "./time.js";

/** How a stream comes back. */
export interface StreamOptions {
  /** Ends the stream when it aborts; reading then rejects with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** How long it tries to come back without getting anything. Default: the client's `patience`. */
  patience?: TimeSpan | undefined;
  /** Told each time that the connection broke, before the wait. */
  onReconnect?: ((reconnect: Reconnect) => void) | undefined;
}

/** A connection that broke and is opened again. */
export interface Reconnect {
  /** Why. */
  readonly error: BatonError;
  /** How often in a row, from 1. */
  readonly attempt: number;
  /** Milliseconds until the next try. */
  readonly waitMs: number;
}

/** What a stream carries besides events of the kept kinds. */
export interface FollowOptions extends StreamOptions {
  /** Also `metrics`, at most once a second; they have no sequence. */
  metrics?: boolean | undefined;
  /** Let tokens wait this long to travel together, up to 1 s. */
  batchWindow?: TimeSpan | undefined;
}

/** A task to follow, and the first wanted sequence. */
export interface Position {
  /** The task. */
  taskId: string;
  /** The first wanted sequence. */
  next: bigint;
}

/** Follows tasks from positions to their ends. */
export class Follower {
  readonly #calls: Calls;
  readonly #options: FollowOptions & { patienceMs: number };
  /** Tasks that have not ended, by id. */
  readonly #open = new Map<string, Position>();
  readonly #many: boolean;
  /** The call that makes the task, until the task is known. */
  #run: MessageInitShape<typeof RunTaskRequestSchema> | undefined;
  /** The last position that a single stream asks for. */
  #single: Position | undefined;

  /** Follows tasks that exist, or the one that `run` makes. */
  constructor(
    calls: Calls,
    what: readonly Position[] | MessageInitShape<typeof RunTaskRequestSchema>,
    options: FollowOptions & { patienceMs: number },
  ) {
    this.#calls = calls;
    this.#options = options;
    if (Array.isArray(what)) {
      for (const position of what as readonly Position[]) this.#open.set(position.taskId, { ...position });
      this.#many = this.#open.size > 1;
      if (!this.#many) this.#single = [...this.#open.values()][0];
    } else {
      this.#run = create(RunTaskRequestSchema, what as MessageInitShape<typeof RunTaskRequestSchema>);
      this.#run.requestId ||= newRequestId();
      this.#many = false;
    }
  }

  /** The task of a single stream; unset until the first event of a run. */
  get taskId(): string | undefined {
    return this.#single?.taskId;
  }

  /** The sequence that a single stream goes on with. */
  get nextSequence(): bigint {
    return this.#single?.next ?? 1n;
  }

  /** The events, to the end of all tasks. */
  async *events(): AsyncGenerator<TaskEvent, void, undefined> {
    const signal = this.#options.signal ?? new AbortController().signal;
    const reopen = new Reopening(this.#calls, this.#options, signal);
    while (this.#run !== undefined || this.#open.size > 0) {
      try {
        for await (const event of this.#connect(signal)) {
          if (!this.#take(event)) continue;
          reopen.worked();
          yield event;
          if (this.#run === undefined && this.#open.size === 0) return;
        }
        throw connectionLost("the stream ended before the task");
      } catch (error) {
        await reopen.after(error);
      }
    }
  }

  #connect(signal: AbortSignal): AsyncIterable<TaskEvent> {
    if (this.#run !== undefined) return this.#calls.stream(TaskService.method.runTask, this.#run, { signal });
    const [first, ...others] = [...this.#open.values()];
    const request: MessageInitShape<typeof StreamTaskRequestSchema> = {
      taskId: first?.taskId ?? "",
      fromSequence: first?.next ?? 1n,
      others: others.map(({ taskId, next }) => ({ taskId, afterSequence: next - 1n })),
      includeMetrics: this.#options.metrics ?? false,
      ...this.#batchWindow(),
    };
    return this.#calls.stream(TaskService.method.streamTask, request, { signal });
  }

  #batchWindow(): { batchWindow?: { seconds: bigint; nanos: number } } {
    if (this.#options.batchWindow === undefined) return {};
    const ms = spanMs("batchWindow", this.#options.batchWindow);
    const seconds = Math.floor(ms / 1_000);
    return { batchWindow: { seconds: BigInt(seconds), nanos: Math.round((ms % 1_000) * 1e6) } };
  }

  /** Counts an event and completes it; false when it was seen before. */
  #take(event: TaskEvent): boolean {
    const { body } = event;
    if (this.#single === undefined && !this.#many && body.case === "queued") {
      this.#single = { taskId: body.value.taskId, next: 1n };
      this.#open.set(this.#single.taskId, this.#single);
      this.#run = undefined;
    }
    event.taskId ||= this.#single?.taskId ?? "";
    if (event.sequence === 0n) return true;
    const position = this.#open.get(event.taskId);
    if (position === undefined || event.sequence < position.next) return false;
    if (body.case === "gap") {
      // What of it was seen before is not lost to this reader.
      if (body.value.firstSequence < position.next) body.value.firstSequence = position.next;
    } else if (event.sequence > position.next) {
      throw connectionLost(`event ${position.next} of task ${event.taskId} is missing`);
    }
    position.next = event.sequence + 1n;
    if (body.case === "ended") this.#open.delete(event.taskId);
    return true;
  }
}

/** Decides whether a stream that broke is opened again, and waits before it is. */
export class Reopening {
  readonly #calls: Calls;
  readonly #options: StreamOptions & { patienceMs: number };
  readonly #signal: AbortSignal;
  #nFailures = 0;
  #since: number | undefined;

  /** For one stream. */
  constructor(calls: Calls, options: StreamOptions & { patienceMs: number }, signal: AbortSignal) {
    this.#calls = calls;
    this.#options = options;
    this.#signal = signal;
  }

  /** Something new came. */
  worked(): void {
    this.#nFailures = 0;
    this.#since = undefined;
  }

  /** Waits until it makes sense to open the stream again; rejects when it does not. */
  async after(error: unknown): Promise<void> {
    const { clock, key } = this.#calls.settings;
    if (this.#signal.aborted) throw this.#signal.reason;
    // A credential that lives minutes may have run out; the function gets another.
    const renewable = error instanceof UnauthenticatedError && typeof key === "function" && this.#nFailures === 0;
    if (!isTransient(error) && !renewable) throw error;
    this.#since ??= clock.now();
    const waitMs = backoffMs(clock, this.#nFailures, error.retryAfterMs);
    if (clock.now() + waitMs - this.#since > this.#options.patienceMs) throw error;
    this.#nFailures += 1;
    this.#options.onReconnect?.({ error, attempt: this.#nFailures, waitMs });
    await sleep(clock, waitMs, this.#signal);
  }
}
