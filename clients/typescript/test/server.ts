// The real binary: a server on a free port that can be killed and come back, and runners for it.

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import http, { type IncomingMessage } from "node:http";
import https from "node:https";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";

const BINARY = process.env["BATON_BIN"] ?? join(import.meta.dirname, "../../../../target/debug/baton");

/** No condition takes longer than this. */
export const SOON = 30_000;

/** Looks until there is something, at most `SOON`. */
export async function eventually<T>(what: string, look: () => Promise<T | undefined> | T | undefined): Promise<T> {
  const until = Date.now() + SOON;
  for (;;) {
    const found = await look();
    if (found !== undefined) return found;
    if (Date.now() > until) throw new Error(`waited in vain: ${what}`);
    await delay(20);
  }
}

/** A port that nobody uses. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

/** A server, and the runners that it has. */
export class Server {
  readonly #processes = new Set<ChildProcess>();
  #server: ChildProcess | undefined;

  private constructor(
    readonly port: number,
    readonly dir: string,
    private readonly args: readonly string[],
    private readonly env: Readonly<Record<string, string>>,
  ) {}

  /** Where it is. */
  get url(): string {
    return `${this.args.includes("--tls") ? "https" : "http"}://127.0.0.1:${this.port}`;
  }

  /** Starts `baton dev` with these arguments; without `--no-runner` it has runners itself. */
  static async start(args: readonly string[] = [], env: Readonly<Record<string, string>> = {}): Promise<Server> {
    if (!existsSync(BINARY)) throw new Error(`there is no ${BINARY}: build it, or name it in BATON_BIN`);
    const server = new Server(await freePort(), mkdtempSync(join(tmpdir(), "baton-ts-")), args, env);
    await server.start();
    return server;
  }

  /** A server whose runner is a process of its own, and outlives it. */
  static async withRunner(args: readonly string[] = [], env: Readonly<Record<string, string>> = {}): Promise<Server> {
    const server = await Server.start(["--no-runner", ...args], env);
    const key = args.includes("--auth") ? { BATON_API_KEY: server.key() } : undefined;
    const engine = ["--engine", "ngram", "--model", "baton/ngram", "--slots", "8"];
    server.spawn("runner", BINARY, ["runner", "start", ...engine, "--address", server.url], key);
    return server;
  }

  /** Starts it, or starts it again with the same data. */
  async start(): Promise<void> {
    const place = ["--addr", `127.0.0.1:${this.port}`, "--data-dir", join(this.dir, "data")];
    const child = this.spawn("server", BINARY, ["dev", ...place, ...this.args]);
    this.#server = child;
    await eventually("the server to be ready", async () => {
      if (child.exitCode !== null) throw new Error(`the server ended:\n${this.log()}`);
      return (await this.#isReady()) || undefined;
    });
  }

  #isReady(): Promise<boolean> {
    return new Promise((resolve) => {
      const ready = (answer: IncomingMessage) => resolve(answer.resume().statusCode === 200);
      const request = this.url.startsWith("https:")
        ? https.get(`${this.url}/readyz`, { rejectUnauthorized: false, agent: false }, ready)
        : http.get(`${this.url}/readyz`, { agent: false }, ready);
      request.on("error", () => resolve(false));
    });
  }

  /** Ends it, by default without warning. */
  async kill(signal: "SIGKILL" | "SIGTERM" = "SIGKILL"): Promise<void> {
    if (this.#server) await end(this.#server, signal);
  }

  /** The key that a server with `--auth` made at its first start. */
  key(): string {
    return readFileSync(join(this.dir, "data", "admin.key"), "utf8").trim();
  }

  /** The authority that vouches for a server with `--tls`. */
  authority(): string {
    return readFileSync(join(this.dir, "data", "tls", "ca.pem"), "utf8");
  }

  /** What a process said. */
  log(name = "server"): string {
    return readFileSync(join(this.dir, `${name}.log`), "utf8");
  }

  /** Ends everything. */
  async stop(): Promise<void> {
    await Promise.all([...this.#processes].map((child) => end(child, "SIGKILL")));
    const panicked = this.log().includes("panicked");
    if (panicked) throw new Error(this.log());
    rmSync(this.dir, { recursive: true });
  }

  /** Starts a process that ends with this; what it says is in `NAME.log`. */
  spawn(name: string, command: string, args: readonly string[], env: Readonly<Record<string, string>> = {}): ChildProcess {
    const log = openSync(join(this.dir, `${name}.log`), "a");
    const child = spawn(command, args, { stdio: ["ignore", log, log], env: { ...process.env, ...this.env, ...env } });
    closeSync(log);
    this.#processes.add(child);
    // A test that fails hard must leave nothing behind.
    const kill = () => child.kill("SIGKILL");
    process.once("exit", kill);
    child.once("exit", () => process.removeListener("exit", kill));
    return child;
  }
}

async function end(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill(signal);
  await once(child, "exit");
}
