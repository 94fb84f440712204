/**
 * Baton for browsers, and wherever there is `fetch`: JSON and server-sent
 * events. In Node, import the package by its name to get gRPC.
 *
 * @packageDocumentation
 */

import { BatonClient, type BatonOptions } from "./client.js";
import { invalid } from "./errors.js";
import { systemClock } from "./time.js";
import { FetchTransport } from "./transport-fetch.js";

export * from "./api.js";

/** Options of a client over fetch. */
export interface BrowserOptions extends BatonOptions {
  /** Address of the server, with its path where it has one. Default: the origin of the page. */
  url?: string | URL | undefined;
  /** Used in place of the global `fetch`. */
  fetch?: typeof fetch | undefined;
}

/** A client of one server, over fetch. */
export class Baton extends BatonClient {
  /** Makes no call yet. */
  constructor(options: BrowserOptions = {}) {
    const page = (globalThis as { location?: { origin: string } }).location?.origin;
    const url = options.url ?? page;
    if (url === undefined) throw invalid("url", 'must be given here: write new Baton({ url: "http://127.0.0.1:7070" })');
    if (!URL.canParse(url)) throw invalid("url", `is ${String(url)}: write for example http://127.0.0.1:7070`);
    super(new FetchTransport(new URL(url), options.fetch ?? globalThis.fetch, systemClock), options);
  }
}
