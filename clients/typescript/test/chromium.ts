// A real browser, and a place for the pages that it opens.

import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { build } from "esbuild";
import { chromium, type Page } from "playwright-core";

import { SOON } from "./server.js";

/** A page, and what went wrong on it. */
export interface OpenPage {
  page: Page;
  problems: string[];
  close(): Promise<void>;
}

/** Opens a page in headless Chromium. Certificates are not looked at: that of the server is made for the test. */
export async function openPage(url: string): Promise<OpenPage> {
  const profile = mkdtempSync(join(tmpdir(), "baton-page-"));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium",
    headless: true,
    ignoreHTTPSErrors: true,
    viewport: { width: 1000, height: 800 },
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
  });
  const problems: string[] = [];
  const close = async () => {
    await browser.close();
    rmSync(profile, { recursive: true, force: true });
  };
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(SOON);
    page.on("pageerror", (error) => problems.push(String(error)));
    await page.goto(url);
    return { page, problems, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Serves a page that runs a bundle of `script`, until closed. */
export async function servePage(port: number, script: string): Promise<{ close(): void }> {
  const { outputFiles } = await build({ entryPoints: [script], bundle: true, format: "esm", write: false });
  const code = outputFiles[0]?.text ?? "";
  const server = createServer((request, response) => {
    const [type, body] =
      request.url === "/page.js"
        ? ["text/javascript", code]
        : ["text/html", '<!doctype html><link rel="icon" href="data:,"><script type="module" src="/page.js"></script>'];
    response.writeHead(200, { "content-type": type }).end(body);
  }).listen(port, "127.0.0.1");
  await once(server, "listening");
  return server;
}
