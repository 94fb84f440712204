// Claims about the examples and about the client in a real browser.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";

import type { Page } from "playwright-core";

import { Baton } from "../src/node.js";
import { openPage, type OpenPage } from "./chromium.js";
import { eventually, freePort, Server, SOON } from "./server.js";

const ROOT = join(import.meta.dirname, "../..");
const EXAMPLES = join(ROOT, "examples");

describe("a page in Chromium", { timeout: 180_000 }, () => {
  let server: Server;
  let open: OpenPage;
  let page: Page;

  before(async () => {
    const origin = `http://127.0.0.1:${await freePort()}`;
    server = await Server.withRunner(["--auth"], { BATON_HTTP_CORS_ORIGINS: origin });
    const env = { BATON_ADDRESS: server.url, BATON_API_KEY: server.key(), PORT: new URL(origin).port };
    server.spawn("example", process.execPath, [join(EXAMPLES, "chat/server.mjs")], env);
    await eventually("the example's backend", () => server.log("example").includes("open http") || undefined);
    open = await openPage(origin);
    page = open.page;
  });
  after(async () => {
    await open?.close();
    await server?.stop();
  });

  test("streams a task over a server that is killed: the exact transcript, each token once", async () => {
    const baton = new Baton({ url: server.url, key: server.key() });
    const prompt = "Alice was beginning to";
    const whole = await (await baton.submit("baton/ngram", { prompt }, { seed: 8, params: { max_tokens: 300 } })).result();

    await page.fill("[name=prompt]", prompt);
    await page.fill("[name=pace]", "60");
    await page.click("button:has-text('Submit')");
    await page.waitForFunction(() => document.querySelectorAll("#output span").length >= 60);
    await server.kill();
    await page.waitForSelector("#pill[data-state=reconnecting]");
    await page.screenshot({ path: join(ROOT, "build/page-reconnecting.png") });
    await server.start();
    await page.waitForSelector("#pill[data-state=ended]");
    await page.screenshot({ path: join(ROOT, "build/page-ended.png") });

    const pieces = await page.$$eval("#output span", (spans) =>
      spans.map((span) => ({ text: span.textContent ?? "", index: Number((span as HTMLElement).dataset["index"]) })),
    );
    assert.deepEqual(pieces.map(({ index }) => index), [...Array(300).keys()]);
    assert.equal(pieces.map(({ text }) => text).join(""), whole.text);
    assert.deepEqual(open.problems, []);
    baton.close();
  });

  test("leaves a stream when told to, and the task goes on", async () => {
    await page.fill("[name=pace]", "5");
    await page.click("button:has-text('Submit')");
    await page.waitForFunction(() => document.querySelectorAll("#output span").length >= 3);
    await page.click("#stop");
    await page.waitForSelector("#pill:has-text('the task goes on')");
    assert.deepEqual(open.problems, []);
  });
});

describe("the examples", { timeout: 60_000 }, () => {
  let server: Server;
  before(async () => (server = await Server.start()));
  after(() => server.stop());

  for (const example of ["stream.mjs", "durable.mjs"]) {
    test(`${example} runs`, async () => {
      const env = { ...process.env, BATON_ADDRESS: server.url };
      const { stdout } = await promisify(execFile)(process.execPath, [join(EXAMPLES, example)], { env, timeout: SOON });
      assert.ok(stdout.trim().split(/\s+/).length > 10, stdout);
    });
  }
});
