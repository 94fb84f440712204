/**
 * Baton for Node, over gRPC.
 *
 * @packageDocumentation
 */

import { readFileSync } from "node:fs";
import { env } from "node:process";

import { BatonClient, type BatonOptions } from "./client.js";
import { invalid } from "./errors.js";
import { GrpcTransport, type TlsOptions } from "./transport-grpc.js";

export * from "./api.js";
export type { TlsOptions };

/** Options of a client over gRPC. */
export interface NodeOptions extends BatonOptions {
  /** Address of the server. Default: `BATON_ADDRESS`, or else http://127.0.0.1:7070. */
  url?: string | URL | undefined;
  /**
   * Certificates for an `https` address. Default: the files `BATON_CA_CERT`,
   * `BATON_CLIENT_CERT` and `BATON_CLIENT_KEY`, as the command line has them.
   */
  tls?: TlsOptions | undefined;
}

/**
 * A client of one server, over gRPC. Without a `key` it takes `BATON_API_KEY`,
 * or the content of the file `BATON_API_KEY_FILE`, as the command line does.
 */
export class Baton extends BatonClient {
  /** Makes no connection yet. */
  constructor(options: NodeOptions = {}) {
    const url = options.url ?? env["BATON_ADDRESS"] ?? "http://127.0.0.1:7070";
    const text = String(url).includes("://") ? String(url) : `http://${url}`;
    const parsed = URL.canParse(text) ? new URL(text) : undefined;
    if (parsed === undefined || !/^https?:$/.test(parsed.protocol)) {
      throw invalid("url", `is ${String(url)}: write for example http://127.0.0.1:7070`);
    }
    super(new GrpcTransport(parsed, options.tls ?? tlsOfEnvironment()), { ...options, key: options.key ?? keyOfEnvironment() });
  }
}

function keyOfEnvironment(): string | undefined {
  const file = env["BATON_API_KEY_FILE"];
  return file ? readFileSync(file, "utf8").trim() : env["BATON_API_KEY"] || undefined;
}

function tlsOfEnvironment(): TlsOptions {
  const files = { ca: env["BATON_CA_CERT"], cert: env["BATON_CLIENT_CERT"], key: env["BATON_CLIENT_KEY"] };
  const tls: TlsOptions = {};
  for (const name of ["ca", "cert", "key"] as const) {
    const file = files[name];
    if (file) tls[name] = readFileSync(file);
  }
  return tls;
}
