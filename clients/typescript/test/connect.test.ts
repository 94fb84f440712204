// Claims about clients that are not ours: Connect-ES over gRPC-Web in Chromium, with TLS; and about ours with TLS.

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { Baton } from "../src/node.js";
import { openPage, servePage, type OpenPage } from "./chromium.js";
import type { Flows } from "./connect-page.js";
import { eventually, freePort, Server } from "./server.js";
import { all } from "./support.js";

describe("with TLS", { timeout: 120_000 }, () => {
  let server: Server;
  let pages: { close(): void };
  let open: OpenPage;
  const protocols = new Set<string>();

  before(async () => {
    const port = await freePort();
    const origin = `http://127.0.0.1:${port}`;
    server = await Server.start(["--tls"], { BATON_HTTP_CORS_ORIGINS: origin });
    pages = await servePage(port, join(import.meta.dirname, "connect-page.js"));
    open = await openPage(origin);
    const network = await open.page.context().newCDPSession(open.page);
    network.on("Network.responseReceived", ({ response }) => {
      if (response.url.startsWith(server.url)) protocols.add(response.protocol ?? "");
    });
    await network.send("Network.enable");
  });
  after(async () => {
    await open?.close();
    pages?.close();
    await server?.stop();
  });

  /** Runs a flow in the page. */
  async function flow<F extends keyof Flows>(name: F, ...more: string[]): Promise<Awaited<ReturnType<Flows[F]>>> {
    const run = ([name, ...args]: string[]) =>
      (globalThis as unknown as { flows: Record<string, (...args: string[]) => unknown> }).flows[name ?? ""]?.(...args);
    return (await open.page.evaluate(run, [name, server.url, ...more])) as Awaited<ReturnType<Flows[F]>>;
  }

  test("Connect in a browser submits, follows and reads the result", async () => {
    const { same, sequences, text, end, result } = await flow("submit");
    assert.ok(same, "one request id, two tasks");
    assert.deepEqual(sequences, sequences.map((_, at) => at + 1));
    assert.equal(end, "SUCCEEDED");
    assert.equal(text, result);
    assert.ok(text.length > 50, text);
    assert.deepEqual([...protocols], ["h2"]);
  });

  test("Connect in a browser cancels", async () => {
    assert.deepEqual(await flow("cancel"), { end: "CANCELLED", reason: "CANCELLED" });
  });

  test("a run that Connect leaves is cancelled", async () => {
    const left = await flow("leave");
    assert.equal(left?.code, "Canceled");
    await eventually("the cancel", async () => (await flow("state", left.taskId)) === "CANCELLED" || undefined);
  });

  test("Connect in a browser reads reasons and fields of errors", async () => {
    const [missing, malformed, stream, late] = (await flow("errors")) as unknown[][];
    assert.deepEqual(missing, ["NotFound", "NOT_FOUND", undefined]);
    assert.deepEqual(malformed, ["InvalidArgument", "INVALID_PARAMS", "spec.model"]);
    assert.deepEqual(stream, ["NotFound", "NOT_FOUND", undefined]);
    assert.equal(late?.[0], "DeadlineExceeded");
  });

  test("our own client streams over HTTP/2 in a browser", async () => {
    const text = "over fetch and TLS";
    assert.deepEqual(await flow("ours"), { text, result: text, refused: "NOT_FOUND" });
    assert.deepEqual([...protocols], ["h2"]);
  });

  test("the client for Node trusts the authority that it is given, and no other", async () => {
    const baton = new Baton({ url: server.url, tls: { ca: server.authority() } });
    assert.equal((await all(baton.run("baton/echo", { text: "over TLS" }))).map(({ text }) => text).join(""), "over TLS");
    baton.close();
    const distrustful = new Baton({ url: server.url, retries: 0 });
    await assert.rejects(distrustful.get("x"), (error) => {
      assert.match(String(error), /certificate/);
      return true;
    });
    distrustful.close();
  });

  test("no page had a problem", () => assert.deepEqual(open.problems, []));
});
