// Calls over gRPC, for Node.

import { Code, ConnectError, type Transport as ConnectTransport } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import type {
  DescMessage,
  DescMethodServerStreaming,
  DescMethodUnary,
  MessageInitShape,
  MessageShape,
} from "@bufbuild/protobuf";
import type { ClientHttp2Stream, ClientSessionRequestOptions, OutgoingHttpHeaders, SecureClientSessionOptions } from "node:http2";

import { clientClosed, errorOfStatus, type Detail } from "./errors.js";
import type { CallContext, Transport } from "./transport.js";

/** Silent connections are asked this often whether they live: less than what proxies allow. */
const PING_INTERVAL_MS = 20_000;
const PING_TIMEOUT_MS = 10_000;
/** A result with its text is far below. */
const MAX_MESSAGE = 16 << 20;
/** Receive window of a stream, as the command line has it. */
const STREAM_WINDOW = 4 << 20;
/** Calls beyond what a server allows on one connection would wait in silence, so more get another. */
const CALLS_PER_CONNECTION = 500;

/** Certificates for TLS, as PEM. */
export interface TlsOptions {
  /** Authorities to trust in place of those that Node knows. */
  ca?: string | Uint8Array;
  /** Certificate of this client, where the server asks for one. */
  cert?: string | Uint8Array;
  /** Its key. */
  key?: string | Uint8Array;
}

interface Connection {
  transport: ConnectTransport;
  sessions: Sessions;
  calls: number;
}

/** Names a call within this process, between the transport and its sessions. */
const CALL = "x-baton-call";

/** Sessions that tell which HTTP/2 stream a call got. */
class Sessions extends Http2SessionManager {
  /** Streams of open calls, by the names of these. */
  readonly streams = new Map<string, ClientHttp2Stream | undefined>();
  #nCalls = 0;

  /** A name for a call. */
  name(): string {
    const name = String((this.#nCalls += 1));
    this.streams.set(name, undefined);
    return name;
  }

  override async request(
    method: string,
    path: string,
    { [CALL]: name, ...headers }: OutgoingHttpHeaders,
    options: Omit<ClientSessionRequestOptions, "signal">,
  ): Promise<ClientHttp2Stream> {
    const stream = await super.request(method, path, headers, options);
    if (this.streams.has(String(name))) this.streams.set(String(name), stream);
    return stream;
  }

  /**
   * Lets go of a call. A stream that the server has ended, and whose data nobody reads, does not
   * close by itself: it would count as open, and keep the process from ending.
   */
  leave(name: string): void {
    const stream = this.streams.get(name);
    this.streams.delete(name);
    // Not before the reset that an abort sends is on its way.
    if (stream !== undefined && !stream.destroyed) setImmediate(() => stream.destroy());
  }
}

/** Calls over gRPC. */
export class GrpcTransport implements Transport {
  readonly #url: string;
  readonly #options: SecureClientSessionOptions;
  readonly #connections: Connection[] = [];

  /** `url` may have a path, for servers behind a prefix. */
  constructor(url: URL, tls: TlsOptions | undefined) {
    this.#url = url.href.replace(/\/+$/, "");
    this.#options = { settings: { initialWindowSize: STREAM_WINDOW, enablePush: false } };
    if (tls?.ca !== undefined) this.#options.ca = pem(tls.ca);
    if (tls?.cert !== undefined) this.#options.cert = pem(tls.cert);
    if (tls?.key !== undefined) this.#options.key = pem(tls.key);
  }

  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageShape<I>,
    { signal, timeoutMs, headers }: CallContext,
  ): Promise<MessageShape<O>> {
    const connection = this.#connection();
    connection.calls += 1;
    const name = connection.sessions.name();
    try {
      const input = request as MessageInitShape<I>;
      const metadata = { ...headers, [CALL]: name };
      const answer = await connection.transport.unary(method, signal, timeoutMs, metadata, input);
      return answer.message;
    } catch (error) {
      throw signal.aborted ? signal.reason : ours(error);
    } finally {
      connection.calls -= 1;
      connection.sessions.leave(name);
    }
  }

  async *stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageShape<I>,
    { signal, timeoutMs, headers, onOpen }: CallContext,
  ): AsyncGenerator<MessageShape<O>> {
    const connection = this.#connection();
    connection.calls += 1;
    const name = connection.sessions.name();
    // Leaving an iteration early must end the call, and connect ends it by signal alone.
    const call = new AbortController();
    const leave = () => call.abort(signal.reason);
    if (signal.aborted) leave();
    signal.addEventListener("abort", leave, { once: true });
    try {
      const input = once(request as MessageInitShape<I>);
      const metadata = { ...headers, [CALL]: name };
      const answer = await connection.transport.stream(method, call.signal, timeoutMs, metadata, input);
      onOpen?.();
      yield* answer.message;
    } catch (error) {
      throw signal.aborted ? signal.reason : ours(error);
    } finally {
      signal.removeEventListener("abort", leave);
      connection.calls -= 1;
      call.abort();
      connection.sessions.leave(name);
    }
  }

  close(): void {
    for (const { sessions } of this.#connections) sessions.abort(clientClosed());
    this.#connections.length = 0;
  }

  /** A connection with room for a call. */
  #connection(): Connection {
    const free = this.#connections.find(({ calls }) => calls < CALLS_PER_CONNECTION);
    if (free !== undefined) return free;
    const pings = { pingIntervalMs: PING_INTERVAL_MS, pingTimeoutMs: PING_TIMEOUT_MS };
    const sessions = new Sessions(this.#url, pings, this.#options);
    const transport = createGrpcTransport({
      baseUrl: this.#url,
      sessionManager: sessions,
      readMaxBytes: MAX_MESSAGE,
      acceptCompression: [],
    });
    const connection = { transport, sessions, calls: 0 };
    this.#connections.push(connection);
    return connection;
  }
}

async function* once<T>(value: T): AsyncGenerator<T> {
  yield value;
}

function pem(text: string | Uint8Array): string | Buffer {
  return typeof text === "string" ? text : Buffer.from(text);
}

function ours(error: unknown): unknown {
  const failure = ConnectError.from(error, Code.Unavailable);
  const details: Detail[] = [];
  for (const detail of failure.details) {
    if ("type" in detail) details.push({ type: detail.type, value: detail.value });
  }
  const correlationId = failure.metadata.get("x-correlation-id") ?? undefined;
  const cause = details.length === 0 ? failure : undefined;
  return errorOfStatus(failure.code, failure.rawMessage, details, correlationId, cause);
}
