// The client: what Node and browsers share.

import { create, type DescService, type JsonObject, type MessageInitShape } from "@bufbuild/protobuf";
import { timestampDate, type Timestamp } from "@bufbuild/protobuf/wkt";

import { Calls, newRequestId, OPENED, type CallOptions, type CallSettings, type Credential, type ServiceClient } from "./calls.js";
import { connectionLost, invalid, taskErrorOf } from "./errors.js";
import { Follower, Reopening, type FollowOptions, type Position, type StreamOptions } from "./follow.js";
import { TaskEventSchema, TaskState, type TaskEvent } from "./gen/baton/v1/events_pb.js";
import { KeyService } from "./gen/baton/v1/keys_pb.js";
import {
  RunTaskRequest_OnDisconnect,
  TaskService,
  type RetryPolicySchema,
  type RunTaskRequestSchema,
  type SubmitTaskResponse,
  type Task,
  type TaskExplanation,
  type TaskSpecSchema,
} from "./gen/baton/v1/tasks_pb.js";
import { TaskStream, type Result } from "./stream.js";
import { durationOf, momentOf, spanMs, systemClock, type Clock, type TimeSpan } from "./time.js";
import type { Transport } from "./transport.js";

/** Options of a client, wherever it runs. */
export interface BatonOptions {
  /** API key, or a function that gets one or a token; asked before each call. */
  key?: Credential | undefined;
  /** Longest time of a call with one answer, repetitions included. Default 30 s. */
  timeout?: TimeSpan | undefined;
  /** Most repetitions of a call that is safe to repeat. Default 6; 0 never repeats. */
  retries?: number | undefined;
  /** How long a stream tries to come back without getting anything. Default 2 min. */
  patience?: TimeSpan | undefined;
}

/** How a task is to run. */
export interface TaskOptions {
  /** Parameters of the execution, such as sampling settings. */
  params?: JsonObject | undefined;
  /** Higher starts earlier, -100 to 100. */
  priority?: number | undefined;
  /** Up to 64 labels. */
  labels?: Record<string, string> | undefined;
  /** Labels that the runner must have. */
  requiredLabels?: Record<string, string> | undefined;
  /** Must end by then: a date, or a time from now. */
  deadline?: Date | TimeSpan | undefined;
  /** Must have started this long after the submit. */
  startTimeout?: TimeSpan | undefined;
  /** An attempt may run this long. */
  executionTimeout?: TimeSpan | undefined;
  /** When to try again. */
  retry?: MessageInitShape<typeof RetryPolicySchema> | undefined;
  /** Earliest start: a date, or a time from the submit. */
  notBefore?: Date | TimeSpan | undefined;
  /** Seed of the sampler. */
  seed?: number | bigint | undefined;
  /** Session whose context the task continues. */
  sessionId?: string | undefined;
  /** Refuse the submit when the deadline cannot be met. */
  requireOnTime?: boolean | undefined;
  /** The same id with the same request gives the same task for 24 h. Made when absent. */
  requestId?: string | undefined;
}

/** Options of a submit. */
export interface SubmitOptions extends TaskOptions, CallOptions {}

/** Options of a run. */
export interface RunOptions extends TaskOptions, FollowOptions {
  /**
   * What becomes of the task when the reader leaves, or its connection breaks,
   * before the end. Default `cancel`.
   */
  onDisconnect?: "cancel" | "keep" | undefined;
}

/** Options of a stream of one task. */
export interface TaskStreamOptions extends FollowOptions {
  /** First wanted sequence. Default: the beginning. */
  from?: number | bigint | undefined;
}

/** Which tasks to list. */
export interface ListFilter {
  /** Only these states. */
  states?: readonly TaskState[] | undefined;
  /** Only this model. */
  model?: string | undefined;
  /** Only tasks with all of these labels. */
  labels?: Record<string, string> | undefined;
  /** Only tasks created at or after this time. */
  createdAfter?: Date | undefined;
  /** Only tasks created before this time. */
  createdBefore?: Date | undefined;
  /** Only tasks of this session. */
  sessionId?: string | undefined;
  /** Leave out tasks that were retried. */
  excludeRetried?: boolean | undefined;
  /** Tasks that are fetched at once, 1 to 1,000. Default 50. */
  pageSize?: number | undefined;
}

/** Which tasks to watch. */
export interface WatchFilter {
  /** Only this model. */
  model?: string | undefined;
  /** Only tasks with all of these labels. */
  labels?: Record<string, string> | undefined;
  /** Only tasks of this session. */
  sessionId?: string | undefined;
}

/** A client of one server. Use `Baton` of the package's entry. */
export class BatonClient {
  readonly #calls: Calls;
  readonly #patienceMs: number;

  /** For entries of this package and for tests. */
  constructor(transport: Transport, options: BatonOptions, clock: Clock = systemClock) {
    const settings: CallSettings = {
      transport,
      clock,
      key: options.key,
      timeoutMs: spanMs("timeout", options.timeout ?? "30s"),
      retries: options.retries ?? 6,
    };
    this.#calls = new Calls(settings);
    this.#patienceMs = spanMs("patience", options.patience ?? "2m");
  }

  /** Submits a task. It is on stable storage when this resolves. */
  async submit<I extends object = JsonObject, O = JsonObject>(
    model: string,
    input: I,
    options: SubmitOptions = {},
  ): Promise<TaskHandle<O>> {
    const request = { spec: specOf(model, input, options), requestId: options.requestId ?? newRequestId() };
    const answer = await this.#calls.unary(TaskService.method.submitTask, request, options);
    return new TaskHandle<O>(this, answer.task?.taskId ?? "", answer);
  }

  /**
   * Submits a task and streams it in one call. The task is cancelled when the
   * reader leaves, unless `onDisconnect` is `keep`.
   */
  run<I extends object = JsonObject, O = JsonObject>(
    model: string,
    input: I,
    options: RunOptions = {},
  ): TaskStream<O> {
    const keep = options.onDisconnect === "keep";
    const request: MessageInitShape<typeof RunTaskRequestSchema> = {
      spec: specOf(model, input, options),
      requestId: options.requestId ?? newRequestId(),
      onDisconnect: keep ? RunTaskRequest_OnDisconnect.KEEP : RunTaskRequest_OnDisconnect.CANCEL,
    };
    // After a reconnect the server does not know that this reader is the one that counts.
    const left = async (taskId: string | undefined) => {
      if (keep || taskId === undefined) return;
      await this.cancel(taskId, "the reader left", { timeout: "5s" }).catch(() => undefined);
    };
    return this.#taskStream<O>(new Follower(this.#calls, request, this.#following(options)), left);
  }

  /** A task by its id; makes no call. */
  task<O = JsonObject>(taskId: string): TaskHandle<O> {
    return new TaskHandle<O>(this, checkedId(taskId));
  }

  /** The stream of a task: iterate it for tokens, or its `events()`. */
  stream<O = JsonObject>(taskId: string, options: TaskStreamOptions = {}): TaskStream<O> {
    const position = { taskId: checkedId(taskId), next: firstOf(options.from) };
    return this.#taskStream<O>(new Follower(this.#calls, [position], this.#following(options)));
  }

  /** Events of up to 257 tasks over one connection; each carries its `taskId`. Ends with the last task. */
  streamMany(
    tasks: readonly (string | { taskId: string; from?: number | bigint | undefined })[],
    options: FollowOptions = {},
  ): AsyncGenerator<TaskEvent, void, undefined> {
    const positions = tasks.map((task): Position =>
      typeof task === "string"
        ? { taskId: checkedId(task), next: 1n }
        : { taskId: checkedId(task.taskId), next: firstOf(task.from) },
    );
    if (positions.length === 0) throw invalid("tasks", "must name at least one task");
    return new Follower(this.#calls, positions, this.#following(options)).events();
  }

  /** Returns a task. */
  get(taskId: string, options: CallOptions = {}): Promise<Task> {
    return this.#calls.unary(TaskService.method.getTask, { taskId: checkedId(taskId) }, options);
  }

  /**
   * The result of a task; waits for its end. A task that does not succeed
   * rejects with a {@link TaskEndedError}. Only `signal` and `patience` limit
   * the wait.
   */
  async result<O = JsonObject>(taskId: string, options: StreamOptions = {}): Promise<Result<O>> {
    const { signal } = options;
    const before = await this.get(taskId, { signal });
    if (before.endTime === undefined) {
      // Only the end is wanted, so that what is stored already need not come.
      const stream = this.stream(taskId, { ...options, from: before.lastSequence + 1n });
      for await (const _ of stream.events());
    }
    const task = before.endTime === undefined ? await this.get(taskId, { signal }) : before;
    if (task.state !== TaskState.SUCCEEDED) throw taskErrorOf(taskId, task.state, task.error);
    const result = await this.#calls.unary(TaskService.method.getTaskResult, { taskId }, { signal });
    return {
      taskId,
      output: (result.result ?? {}) as O,
      text: result.text,
      textTruncated: result.textTruncated,
      usage: result.usage,
      artifacts: result.artifacts,
    };
  }

  /** Cancels a task; one that has ended is returned unchanged. */
  cancel(taskId: string, reason = "", options: CallOptions = {}): Promise<Task> {
    return this.#calls.unary(TaskService.method.cancelTask, { taskId: checkedId(taskId), reason }, options);
  }

  /** Submits an ended task again, as a new task. */
  async retry<O = JsonObject>(taskId: string, options: CallOptions & { requestId?: string } = {}): Promise<TaskHandle<O>> {
    const request = { taskId: checkedId(taskId), requestId: options.requestId ?? newRequestId() };
    const task = await this.#calls.unary(TaskService.method.retryTask, request, options);
    return this.task<O>(task.taskId);
  }

  /** Why a task waits, or why it ended as it did. */
  explain(taskId: string, options: CallOptions = {}): Promise<TaskExplanation> {
    return this.#calls.unary(TaskService.method.explainTask, { taskId: checkedId(taskId) }, options);
  }

  /** Deletes an ended task, its events and its transcript. */
  async delete(taskId: string, options: CallOptions = {}): Promise<void> {
    await this.#calls.unary(TaskService.method.deleteTask, { taskId: checkedId(taskId) }, options);
  }

  /** Tasks, newest first, fetched page by page while they are read. */
  async *list(filter: ListFilter = {}, options: CallOptions = {}): AsyncGenerator<Task, void, undefined> {
    const { createdAfter, createdBefore, states, ...rest } = filter;
    const request = {
      ...defined(rest),
      ...(states ? { states: [...states] } : {}),
      ...(createdAfter ? { createdAfter: momentOf("createdAfter", createdAfter) } : {}),
      ...(createdBefore ? { createdBefore: momentOf("createdBefore", createdBefore) } : {}),
    };
    let pageToken = "";
    do {
      const page = await this.#calls.unary(TaskService.method.listTasks, { ...request, pageToken }, options);
      yield* page.tasks;
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
  }

  /**
   * What happens to all matching tasks from now on; ends only when the reader
   * leaves. When the connection broke, events were missed: that is a `gap`
   * without a task. List the tasks then.
   */
  async *watch(filter: WatchFilter = {}, options: StreamOptions = {}): AsyncGenerator<TaskEvent, void, undefined> {
    const reopen = new Reopening(this.#calls, this.#following(options), options.signal ?? new AbortController().signal);
    for (let broke = false; ; broke = true) {
      try {
        for await (const event of this.#calls.opened(TaskService.method.watchTasks, defined(filter), options.signal)) {
          if (event !== OPENED) {
            reopen.worked();
            yield event;
          } else if (broke) {
            // Not before the server watches again: whoever lists the tasks now misses nothing.
            yield missed();
          }
        }
        throw connectionLost("the stream ended");
      } catch (error) {
        await reopen.after(error);
      }
    }
  }

  /** A token that opens one task for reading, for minutes: to be handed to a browser. */
  async issueToken(
    taskId: string,
    options: CallOptions & { ttl?: TimeSpan } = {},
  ): Promise<{ token: string; expireTime: Date | undefined }> {
    const ttl = options.ttl === undefined ? {} : { ttl: durationOf("ttl", options.ttl) };
    const answer = await this.#calls.unary(KeyService.method.issueToken, { taskId: checkedId(taskId), ...ttl }, options);
    return { token: answer.token, expireTime: dateOf(answer.expireTime) };
  }

  /**
   * The methods of a service of the contract, such as `QueueService`, as
   * functions, with credentials and repetitions.
   */
  service<S extends DescService>(service: S): ServiceClient<S> {
    return this.#calls.client(service);
  }

  /** Lets go of connections; open calls and streams end, and there are no more. */
  close(): void {
    this.#calls.close();
  }

  #following<T extends StreamOptions>(options: T): T & { patienceMs: number } {
    const patienceMs = options.patience === undefined ? this.#patienceMs : spanMs("patience", options.patience);
    return { ...options, patienceMs };
  }

  #taskStream<O>(follower: Follower, left?: (taskId: string | undefined) => Promise<void>): TaskStream<O> {
    return new TaskStream<O>({
      get taskId() {
        return follower.taskId;
      },
      get nextSequence() {
        return follower.nextSequence;
      },
      events: () => follower.events(),
      result: (taskId) => this.result<O>(taskId),
      ...(left === undefined ? {} : { left }),
    });
  }
}

/** A task that a client knows by its id. */
export class TaskHandle<O = JsonObject> {
  readonly #client: BatonClient;

  /** Made by a client. */
  constructor(
    client: BatonClient,
    /** The task. */
    readonly id: string,
    /** What the server answered to the submit, where this came from one: place in the queue, predicted start. */
    readonly submitted?: SubmitTaskResponse,
  ) {
    this.#client = client;
  }

  /** Its stream: iterate it for tokens, or its `events()`. */
  stream(options: TaskStreamOptions = {}): TaskStream<O> {
    return this.#client.stream<O>(this.id, options);
  }

  /** Its tokens, each once, over any number of connections. The same as {@link TaskHandle.stream}. */
  tokens(options: TaskStreamOptions = {}): TaskStream<O> {
    return this.stream(options);
  }

  /** All its events. */
  events(options: TaskStreamOptions = {}): AsyncGenerator<TaskEvent, void, undefined> {
    return this.stream(options).events();
  }

  /** Its result; waits for the end. */
  result(options: StreamOptions = {}): Promise<Result<O>> {
    return this.#client.result<O>(this.id, options);
  }

  /** Its present state. */
  get(options: CallOptions = {}): Promise<Task> {
    return this.#client.get(this.id, options);
  }

  /** Cancels it. */
  cancel(reason = "", options: CallOptions = {}): Promise<Task> {
    return this.#client.cancel(this.id, reason, options);
  }

  /** Submits it again, as a new task; it must have ended. */
  retry(options: CallOptions & { requestId?: string } = {}): Promise<TaskHandle<O>> {
    return this.#client.retry<O>(this.id, options);
  }

  /** Why it waits, or why it ended as it did. */
  explain(options: CallOptions = {}): Promise<TaskExplanation> {
    return this.#client.explain(this.id, options);
  }

  /** Deletes it; it must have ended. */
  delete(options: CallOptions = {}): Promise<void> {
    return this.#client.delete(this.id, options);
  }
}

function specOf(model: string, input: object, options: TaskOptions): MessageInitShape<typeof TaskSpecSchema> {
  const { deadline, startTimeout, executionTimeout, notBefore, seed } = options;
  return {
    model,
    input: input as JsonObject,
    ...defined({
      params: options.params,
      priority: options.priority,
      labels: options.labels,
      requiredLabels: options.requiredLabels,
      retry: options.retry,
      sessionId: options.sessionId,
      requireOnTime: options.requireOnTime,
      seed: seed === undefined ? undefined : BigInt(seed),
      deadline: deadline === undefined ? undefined : momentOf("deadline", deadline),
      startTimeout: startTimeout === undefined ? undefined : durationOf("startTimeout", startTimeout),
      executionTimeout: executionTimeout === undefined ? undefined : durationOf("executionTimeout", executionTimeout),
    }),
    ...(notBefore instanceof Date
      ? { notBefore: momentOf("notBefore", notBefore) }
      : notBefore === undefined
        ? {}
        : { delay: durationOf("notBefore", notBefore) }),
  };
}

/** Without the fields that are unset. */
function defined<T extends object>(fields: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as ReturnType<
    typeof defined<T>
  >;
}

function checkedId(taskId: string): string {
  if (taskId === "") throw invalid("taskId", "must not be empty");
  return taskId;
}

function firstOf(from: number | bigint | undefined): bigint {
  const first = BigInt(from ?? 1);
  if (first < 0n) throw invalid("from", "must not be negative");
  return first === 0n ? 1n : first;
}

function dateOf(time: Timestamp | undefined): Date | undefined {
  return time === undefined ? undefined : timestampDate(time);
}

/** The event that says that a watch missed some. */
function missed(): TaskEvent {
  const reason = "the connection broke, and events of that time are missed";
  return create(TaskEventSchema, { body: { case: "gap", value: { firstSequence: 0n, reason } } });
}
