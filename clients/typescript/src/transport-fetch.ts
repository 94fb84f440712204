// Calls over fetch: JSON for one answer, server-sent events for many.

import {
  fromJson,
  type DescMessage,
  type DescMethod,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type JsonObject,
  type JsonValue,
  type Message,
  type MessageShape,
} from "@bufbuild/protobuf";

import { clientClosed, connectionLost, errorOfStatus, type BatonError, type Detail } from "./errors.js";
import { httpRequest } from "./http-rule.js";
import { SseDecoder } from "./sse.js";
import type { Clock } from "./time.js";
import type { CallContext, Transport } from "./transport.js";

/** The server says something every 15 s; after this much silence the connection is dead. */
const SILENCE_MS = 45_000;

/** A newer server may have fields that this version does not know. */
const READ = { ignoreUnknownFields: true } as const;

/** gRPC codes of answers that are not Baton's, such as a proxy's. */
const CODES: Record<number, number> = { 400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14 };
const UNKNOWN = 2;

/** Calls over fetch. */
export class FetchTransport implements Transport {
  readonly #base: string;
  readonly #fetch: typeof fetch;
  readonly #clock: Clock;
  readonly #open = new Set<AbortController>();

  /** `url` may have a path, for servers behind a prefix. */
  constructor(url: URL, fetcher: typeof fetch, clock: Clock) {
    this.#base = url.href.replace(/\/+$/, "");
    this.#fetch = fetcher;
    this.#clock = clock;
  }

  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageShape<I>,
    context: CallContext,
  ): Promise<MessageShape<O>> {
    return this.#during(context, async (signal) => {
      const response = await this.#send(method, request, context, "application/json", signal);
      return fromJson(method.output, (await response.json()) as JsonValue, READ);
    });
  }

  async *stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageShape<I>,
    context: CallContext,
  ): AsyncGenerator<MessageShape<O>> {
    const call = new AbortController();
    const leave = () => call.abort(context.signal.reason);
    if (context.signal.aborted) leave();
    context.signal.addEventListener("abort", leave, { once: true });
    this.#open.add(call);
    try {
      const response = await this.#send(method, request, context, "text/event-stream", call.signal);
      context.onOpen?.();
      const correlationId = response.headers.get("x-correlation-id") ?? undefined;
      const decoder = new SseDecoder();
      const reader = response.body?.getReader();
      while (reader !== undefined) {
        const { done, value } = await this.#read(reader, call);
        if (done) return;
        for (const { event, data } of decoder.push(value)) {
          const json = JSON.parse(data) as JsonValue;
          if (event === "error") throw statusError(json, correlationId);
          yield fromJson(method.output, json, READ);
        }
      }
    } catch (error) {
      throw context.signal.aborted ? context.signal.reason : ours(error);
    } finally {
      context.signal.removeEventListener("abort", leave);
      this.#open.delete(call);
      // Leaving an iteration early must end the call.
      call.abort();
    }
  }

  close(): void {
    for (const call of this.#open) call.abort(clientClosed());
  }

  /** Runs a call that `close` ends too. */
  async #during<T>(context: CallContext, run: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const call = new AbortController();
    const leave = () => call.abort(context.signal.reason);
    if (context.signal.aborted) leave();
    context.signal.addEventListener("abort", leave, { once: true });
    this.#open.add(call);
    try {
      return await run(call.signal);
    } catch (error) {
      throw context.signal.aborted ? context.signal.reason : ours(error);
    } finally {
      context.signal.removeEventListener("abort", leave);
      this.#open.delete(call);
    }
  }

  async #send(
    method: DescMethod,
    request: Message,
    context: CallContext,
    accept: string,
    signal: AbortSignal,
  ): Promise<Response> {
    const { method: verb, target, body } = httpRequest(method, request);
    const headers: Record<string, string> = { ...context.headers, accept };
    if (verb !== "GET" && verb !== "DELETE") headers["content-type"] = "application/json";
    if (context.timeoutMs !== undefined) headers["x-request-timeout"] = `${context.timeoutMs}ms`;
    const response = await this.#fetch.call(globalThis, this.#base + target, {
      method: verb,
      headers,
      signal,
      cache: "no-store",
      // Credentials are in a header; cookies of a page open nothing.
      credentials: "omit",
      ...(body === undefined ? {} : { body }),
    });
    if (!response.ok) throw await refusal(response);
    return response;
  }

  /** The next piece; a connection that stays silent counts as broken. */
  async #read(
    reader: ReadableStreamDefaultReader<Uint8Array>,
    call: AbortController,
  ): Promise<ReadableStreamReadResult<Uint8Array>> {
    const stop = this.#clock.after(SILENCE_MS, () => {
      call.abort(connectionLost(`nothing came for ${SILENCE_MS / 1_000} s`));
    });
    try {
      return await reader.read();
    } finally {
      stop();
    }
  }
}

/** What the platform throws when there is no connection, or no more, is not of one class. */
function ours(error: unknown): unknown {
  if (error instanceof Error && "code" in error && "reason" in error) return error;
  const detail = error instanceof Error && error.cause instanceof Error ? `: ${error.cause.message}` : "";
  return connectionLost(`cannot reach the server${detail}`, error);
}

async function refusal(response: Response): Promise<BatonError> {
  const correlationId = response.headers.get("x-correlation-id") ?? undefined;
  const text = await response.text();
  try {
    const json = JSON.parse(text) as JsonObject;
    if (typeof json["code"] === "number") return statusError(json, correlationId);
  } catch {
    // Not JSON, so not Baton's.
  }
  const code = CODES[response.status] ?? UNKNOWN;
  const message = `the answer is HTTP ${response.status}, and not of Baton`;
  const retryAfter = Number(response.headers.get("retry-after") ?? NaN);
  const details: Detail[] = [];
  if (Number.isFinite(retryAfter)) details.push({ type: "google.rpc.RetryInfo", value: { retryDelay: `${retryAfter}s` } });
  return errorOfStatus(code, message, details, correlationId);
}

function statusError(json: JsonValue, correlationId: string | undefined): BatonError {
  const status = json as JsonObject;
  const details: Detail[] = [];
  for (const detail of Array.isArray(status["details"]) ? status["details"] : []) {
    const { "@type": type, ...value } = detail as JsonObject;
    details.push({ type: String(type).replace(/^.*\//, ""), value });
  }
  const message = typeof status["message"] === "string" ? status["message"] : "";
  return errorOfStatus(Number(status["code"]), message, details, correlationId);
}
