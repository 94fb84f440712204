// Single calls with credentials, a time limit, and repetitions where they cannot do harm.

import {
  create,
  getOption,
  hasOption,
  type DescMessage,
  type DescMethod,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type DescService,
  type Message,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";

import { BatonError, callTimedOut, clientClosed, isTransient, keyUnavailable } from "./errors.js";
import { http } from "./gen/google/api/annotations_pb.js";
import { backoffMs, sleep, spanMs, type Clock, type TimeSpan } from "./time.js";
import type { Transport } from "./transport.js";

/** What can be said with each call. */
export interface CallOptions {
  /** Ends the call when it aborts; the call then rejects with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Longest time of the call, repetitions included. Default: the client's `timeout`. */
  timeout?: TimeSpan | undefined;
}

/** A secret, or a function that gets one; it is asked before each call and may cache. */
export type Credential = string | (() => string | Promise<string>);

/** The server has accepted a streaming call. */
export const OPENED = Symbol("opened");

/** What all calls of a client share. */
export interface CallSettings {
  /** What carries them. */
  transport: Transport;
  /** Time and chance. */
  clock: Clock;
  /** Sent as a bearer token. */
  key: Credential | undefined;
  /** Longest time of a call, in milliseconds. */
  timeoutMs: number;
  /** Most repetitions of a call. */
  retries: number;
}

/** The methods of a service as functions. Methods to which the client streams are not among them. */
export type ServiceClient<S extends DescService> = {
  [M in keyof S["method"] as S["method"][M] extends DescMethodUnary | DescMethodServerStreaming
    ? M
    : never]: S["method"][M] extends DescMethodUnary<infer I, infer O>
    ? (request: MessageInitShape<I>, options?: CallOptions) => Promise<MessageShape<O>>
    : S["method"][M] extends DescMethodServerStreaming<infer I, infer O>
      ? (request: MessageInitShape<I>, options?: CallOptions) => AsyncIterable<MessageShape<O>>
      : never;
};

/** Makes calls. */
export class Calls {
  /** Shared by all. */
  readonly settings: CallSettings;
  #closed = false;

  /** For a client. */
  constructor(settings: CallSettings) {
    this.settings = settings;
  }

  /** One answer. Repeated while nobody can answer, if that is safe. */
  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    init: MessageInitShape<I>,
    options: CallOptions = {},
  ): Promise<MessageShape<O>> {
    const { clock, transport, retries } = this.settings;
    const request = create(method.input, init);
    giveRequestIds(request, method.input);
    const maxRepeats = isRepeatable(method, request) ? retries : 0;
    const timeoutMs = options.timeout === undefined ? this.settings.timeoutMs : spanMs("timeout", options.timeout);
    const deadline = clock.now() + timeoutMs;
    const call = new AbortController();
    const leave = () => call.abort(options.signal?.reason);
    if (options.signal?.aborted) leave();
    options.signal?.addEventListener("abort", leave, { once: true });
    const stop = clock.after(timeoutMs, () => call.abort(callTimedOut(timeoutMs)));
    try {
      for (let nFailures = 0; ; nFailures += 1) {
        try {
          const headers = await this.headers(call.signal);
          const left = sendable(deadline - clock.now());
          return await transport.unary(method, request, { signal: call.signal, timeoutMs: left, headers });
        } catch (error) {
          if (call.signal.aborted) throw call.signal.reason;
          if (nFailures >= maxRepeats || !isTransient(error)) throw error;
          const wait = backoffMs(clock, nFailures, error.retryAfterMs);
          // Waiting in vain would hide why.
          if (clock.now() + wait >= deadline) throw error;
          await sleep(clock, wait, call.signal);
        }
      }
    } finally {
      stop();
      options.signal?.removeEventListener("abort", leave);
    }
  }

  /** Many answers, of one call that is never repeated here. */
  async *stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    init: MessageInitShape<I>,
    options: CallOptions = {},
  ): AsyncGenerator<MessageShape<O>> {
    const request = create(method.input, init);
    giveRequestIds(request, method.input);
    const signal = options.signal ?? new AbortController().signal;
    const timeoutMs = options.timeout === undefined ? undefined : sendable(spanMs("timeout", options.timeout));
    const headers = await this.headers(signal);
    yield* this.settings.transport.stream(method, request, { signal, timeoutMs, headers });
  }

  /** The same, and `OPENED` as soon as the server has accepted the call, before the first answer. */
  async *opened<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    init: MessageInitShape<I>,
    outer: AbortSignal | undefined,
  ): AsyncGenerator<MessageShape<O> | typeof OPENED> {
    const call = new AbortController();
    const leave = () => call.abort(outer?.reason);
    if (outer?.aborted) leave();
    outer?.addEventListener("abort", leave, { once: true });
    try {
      const { signal } = call;
      const headers = await this.headers(signal);
      let accept: (() => void) | undefined;
      const accepted = new Promise<void>((resolve) => (accept = resolve));
      const context = { signal, timeoutMs: undefined, headers, onOpen: accept };
      const answers = this.settings.transport.stream(method, create(method.input, init), context)[Symbol.asyncIterator]();
      let next = answers.next();
      // Its failure is met below.
      await Promise.race([accepted, next]);
      yield OPENED;
      for (let answer = await next; !answer.done; answer = await next) {
        yield answer.value;
        next = answers.next();
      }
    } finally {
      outer?.removeEventListener("abort", leave);
      // An iterator that waits for an answer does not return before that comes.
      call.abort();
    }
  }

  /** The methods of a service as functions. */
  client<S extends DescService>(service: S): ServiceClient<S> {
    const client: Record<string, unknown> = {};
    for (const method of service.methods) {
      if (method.methodKind === "unary") {
        client[method.localName] = (request: Message, options?: CallOptions) =>
          this.unary(method as DescMethodUnary, request, options);
      } else if (method.methodKind === "server_streaming") {
        client[method.localName] = (request: Message, options?: CallOptions) =>
          this.stream(method as DescMethodServerStreaming, request, options);
      }
    }
    return client as ServiceClient<S>;
  }

  /** Ends all calls; there are no more. */
  close(): void {
    this.#closed = true;
    this.settings.transport.close();
  }

  /** Headers of a call. A function that gets the key does not hold up an abort. */
  private async headers(signal: AbortSignal): Promise<Record<string, string>> {
    const { key } = this.settings;
    if (signal.aborted) throw signal.reason;
    if (this.#closed) throw clientClosed();
    if (key === undefined) return {};
    if (typeof key === "string") return { authorization: `Bearer ${key}` };
    let leave: (() => void) | undefined;
    const aborted = new Promise<never>((_, reject) => {
      leave = () => reject(signal.reason);
      signal.addEventListener("abort", leave, { once: true });
    });
    try {
      return { authorization: `Bearer ${await Promise.race([key(), aborted])}` };
    } catch (error) {
      if (signal.aborted || error instanceof BatonError) throw error;
      throw keyUnavailable(error);
    } finally {
      if (leave) signal.removeEventListener("abort", leave);
    }
  }
}

/** A time limit as it travels: whole milliseconds of at most eight digits; none instead of a longer one. */
function sendable(ms: number): number | undefined {
  const whole = Math.max(1, Math.ceil(ms));
  return whole < 1e8 ? whole : undefined;
}

/** Whether a call that may have been served can be made again: it reads, or says that it can, or has a request id. */
function isRepeatable(method: DescMethod, request: Message): boolean {
  if (method.idempotency !== MethodOptions_IdempotencyLevel.IDEMPOTENCY_UNKNOWN) return true;
  if (hasOption(method, http) && getOption(method, http).pattern.case === "get") return true;
  return requestIdHolders(request, method.input).length > 0;
}

interface HasRequestId {
  requestId: string;
}

/** The messages of a request that take a request id: itself, or those in a list of it. */
function requestIdHolders(request: Message, schema: DescMessage): HasRequestId[] {
  if (takesRequestId(schema)) return [request as Message & HasRequestId];
  const holders: HasRequestId[] = [];
  for (const field of schema.fields) {
    if (field.fieldKind === "list" && field.listKind === "message" && takesRequestId(field.message)) {
      holders.push(...((request as unknown as Record<string, HasRequestId[]>)[field.localName] ?? []));
    }
  }
  return holders;
}

function takesRequestId(schema: DescMessage): boolean {
  return schema.fields.some((field) => field.name === "request_id");
}

function giveRequestIds(request: Message, schema: DescMessage): void {
  for (const holder of requestIdHolders(request, schema)) holder.requestId ||= newRequestId();
}

/** A new request id. `crypto.randomUUID` is missing on pages that did not come over TLS. */
export function newRequestId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x40;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
