// What an application reads: tokens of a task, its events, its result.

import type { JsonObject } from "@bufbuild/protobuf";

import { BatonError, StreamGapError } from "./errors.js";
import type { ArtifactEvent, TaskEvent, Usage } from "./gen/baton/v1/events_pb.js";

/** A piece of output. */
export interface Token {
  /** The text as the engine produced it. */
  readonly text: string;
  /** Index within its attempt, from 0 without holes. */
  readonly index: bigint;
  /** Attempt that made it, from 1. */
  readonly attempt: number;
  /** Position in the task's stream: to resume later, start from the next. */
  readonly sequence: bigint;
  /**
   * True on the first token after tokens of an earlier attempt were read here.
   * Those are void: the task runs again from its beginning.
   */
  readonly restart: boolean;
}

/** What a SUCCEEDED task produced. */
export interface Result<O = JsonObject> {
  /** The task. */
  readonly taskId: string;
  /** Result as the engine gave it. */
  readonly output: O;
  /** All tokens of the last attempt, joined. */
  readonly text: string;
  /** Whether `text` was cut at 3 MiB; read the stream for all of it. */
  readonly textTruncated: boolean;
  /** What the work used. */
  readonly usage: Usage | undefined;
  /** Output files. */
  readonly artifacts: readonly ArtifactEvent[];
}

/** Where a stream's events come from. */
export interface Source<O> {
  /** The task; unset until it is known. */
  readonly taskId: string | undefined;
  /** The sequence that comes next. */
  readonly nextSequence: bigint;
  /** The events, each once. */
  events(): AsyncGenerator<TaskEvent, void, undefined>;
  /** Called when the reader leaves before the end; does not reject. */
  left?(taskId: string | undefined): Promise<void>;
  /** The result of the task, which has ended. */
  result(taskId: string): Promise<Result<O>>;
}

/**
 * The stream of one task, over any number of connections. Iterating it gives
 * tokens; {@link TaskStream.events} gives everything. It is read once: start
 * another to read again.
 */
export class TaskStream<O = JsonObject> implements AsyncIterable<Token> {
  readonly #source: Source<O>;
  #state: "new" | "reading" | "left" | "ended" = "new";

  /** Made by a client. */
  constructor(source: Source<O>) {
    this.#source = source;
  }

  /** The task; unset until the first event of a `run`. */
  get taskId(): string | undefined {
    return this.#source.taskId;
  }

  /** The sequence that comes next: keep it, and another stream goes on `from` there. */
  get nextSequence(): bigint {
    return this.#source.nextSequence;
  }

  /** The tokens, each once, in order. A gap rejects with {@link StreamGapError}. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Token, void, undefined> {
    let attempt = 0;
    for await (const event of this.events()) {
      const { body, sequence } = event;
      if (body.case === "gap") {
        throw new StreamGapError(body.value.firstSequence, sequence + 1n, body.value.reason);
      }
      if (body.case !== "token") continue;
      const restart = attempt !== 0 && attempt !== event.attempt;
      attempt = event.attempt;
      yield { text: body.value.text, index: body.value.index, attempt, sequence, restart };
    }
  }

  /** All events, each once, in order; the last is `ended`. Gaps are events here. */
  async *events(): AsyncGenerator<TaskEvent, void, undefined> {
    if (this.#state !== "new") throw new TypeError("a stream is read once: start another to read again");
    this.#state = "reading";
    let failed = false;
    try {
      for await (const event of this.#source.events()) {
        if (event.body.case === "ended") this.#state = "ended";
        yield event;
      }
    } catch (error) {
      failed = true;
      throw error;
    } finally {
      if (this.#state === "reading") {
        this.#state = "left";
        const told = this.#source.left?.(this.taskId);
        // Whoever leaves knows afterwards that it is done; an error need not wait for it.
        if (!failed) await told;
      }
    }
  }

  /**
   * The result, after the end; reads what is unread. A task that did not
   * succeed rejects with a {@link TaskEndedError}.
   */
  async result(): Promise<Result<O>> {
    if (this.#state === "new") for await (const _ of this.events());
    const { taskId } = this;
    if (this.#state !== "ended" || taskId === undefined) {
      throw new BatonError({
        code: "FAILED_PRECONDITION",
        reason: "STATE_CONFLICT",
        message: "the stream was left before its end: ask for the result by the task's id",
      });
    }
    return this.#source.result(taskId);
  }
}
