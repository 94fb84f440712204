// A clock that is moved by hand, and a transport that answers as told.

import { create, type DescMethod, type Message, type MessageInitShape } from "@bufbuild/protobuf";

import { TaskEventSchema, type TaskEvent } from "../src/gen/baton/v1/events_pb.js";
import type { Clock } from "../src/time.js";
import type { CallContext, Transport } from "../src/transport.js";

/** Goes on to the next timer as soon as nothing else happens; remembers the waits. */
export class FakeClock implements Clock {
  /** Lengths of all timers that came due. */
  readonly waits: number[] = [];
  /** What `random` gives. */
  chance = 0.5;
  #now = 0;
  #timers: { due: number; ms: number; done: () => void }[] = [];

  now(): number {
    return this.#now;
  }

  random(): number {
    return this.chance;
  }

  after(ms: number, done: () => void): () => void {
    const timer = { due: this.#now + ms, ms, done };
    this.#timers.push(timer);
    setImmediate(() => this.#next());
    return () => {
      this.#timers = this.#timers.filter((other) => other !== timer);
    };
  }

  #next(): void {
    this.#timers.sort((a, b) => a.due - b.due);
    const timer = this.#timers.shift();
    if (timer === undefined) return;
    this.#now = timer.due;
    this.waits.push(timer.ms);
    timer.done();
    if (this.#timers.length > 0) setImmediate(() => this.#next());
  }
}

/** A call that was made. */
export interface Made {
  method: string;
  request: Message & Record<string, unknown>;
  context: CallContext;
}

/** Answers of one call: messages, then the end or an error. */
export type Script = (call: Made) => { answers?: Record<string, unknown>[]; error?: unknown; hang?: boolean };

/** Answers calls in order by scripts; the last one answers all that follow. */
export class FakeTransport implements Transport {
  readonly calls: Made[] = [];
  readonly #scripts: Script[];

  constructor(...scripts: Script[]) {
    this.#scripts = scripts;
  }

  // The types of answers are those of the scripts.
  async unary(method: DescMethod, request: Message, context: CallContext): Promise<never> {
    const { answers, error, hang } = this.#answer(method, request, context);
    if (hang) await aborted(context.signal);
    if (error !== undefined) throw error;
    return create(method.output, answers?.[0] ?? {}) as never;
  }

  async *stream(method: DescMethod, request: Message, context: CallContext): AsyncGenerator<never> {
    const { answers, error, hang } = this.#answer(method, request, context);
    if (answers !== undefined || hang) context.onOpen?.();
    for (const answer of answers ?? []) yield create(method.output, answer) as never;
    if (hang) await aborted(context.signal);
    if (error !== undefined) throw error;
  }

  close(): void {}

  #answer(method: DescMethod, request: Message, context: CallContext) {
    // A copy, since the same message may be sent again.
    const made = { method: method.name, request: structuredClone(request) as Made["request"], context };
    this.calls.push(made);
    const script = this.#scripts[Math.min(this.calls.length, this.#scripts.length) - 1];
    if (script === undefined) throw new Error(`no answer for ${method.name}`);
    return script(made);
  }
}

async function aborted(signal: AbortSignal): Promise<never> {
  await new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true }));
  throw signal.reason;
}

/** A token event. */
export function token(sequence: number, text: string, attempt = 1, taskId = ""): Record<string, unknown> {
  return event(sequence, { case: "token", value: { text, index: BigInt(sequence) } }, attempt, taskId);
}

/** The terminal event. */
export function ended(sequence: number, state = 3, taskId = ""): Record<string, unknown> {
  return event(sequence, { case: "ended", value: { state } }, 1, taskId);
}

/** An event. */
export function event(
  sequence: number,
  body: NonNullable<MessageInitShape<typeof TaskEventSchema>["body"]>,
  attempt = 1,
  taskId = "",
): Record<string, unknown> {
  return { sequence: BigInt(sequence), attempt, taskId, body };
}

/** Everything that an iteration gives. */
export async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) found.push(item);
  return found;
}

/** The sequences of events. */
export function sequences(events: TaskEvent[]): number[] {
  return events.map((event) => Number(event.sequence));
}
