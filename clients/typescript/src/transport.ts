// What carries calls: gRPC in Node, fetch in browsers.

import type {
  DescMessage,
  DescMethodServerStreaming,
  DescMethodUnary,
  MessageShape,
} from "@bufbuild/protobuf";

/** What goes with one call. */
export interface CallContext {
  /** Ends the call when it aborts; the call then rejects with its reason. */
  readonly signal: AbortSignal;
  /** The server ends the call after this many milliseconds; unset means never. */
  readonly timeoutMs: number | undefined;
  /** Metadata, or headers. */
  readonly headers: Readonly<Record<string, string>>;
  /** Called when the server has accepted a streaming call. */
  readonly onOpen?: (() => void) | undefined;
}

/** Makes single calls. Rejects with errors of this package, or with the signal's reason. */
export interface Transport {
  /** One request, one answer. */
  unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageShape<I>,
    context: CallContext,
  ): Promise<MessageShape<O>>;

  /** One request, many answers. Leaving the iteration ends the call. */
  stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageShape<I>,
    context: CallContext,
  ): AsyncIterable<MessageShape<O>>;

  /** Lets go of connections; open calls end. */
  close(): void;
}
