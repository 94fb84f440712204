// The backend of the page: it has the API key, submits, and hands the browser a token that opens
// one task for some minutes. Tokens of text go from Baton to the browser directly.
//
//   BATON_HTTP_CORS_ORIGINS=http://127.0.0.1:8000 baton dev --ephemeral
//   node examples/chat/server.mjs
import { build } from "esbuild";
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { env } from "node:process";
import { fileURLToPath } from "node:url";

import { Baton, BatonError } from "baton-client";

const here = (name) => fileURLToPath(new URL(name, import.meta.url));
const url = env.BATON_ADDRESS ?? "http://127.0.0.1:7070";
const baton = new Baton({ url });
const { outputFiles } = await build({ entryPoints: [here("app.js")], bundle: true, format: "esm", minify: true, write: false });

const routes = {
  "GET /": async () => ["text/html; charset=utf-8", await readFile(here("index.html"))],
  "GET /app.js": async () => ["text/javascript", outputFiles[0].contents],
  "POST /tasks": async (body) => {
    const { prompt, ...rest } = JSON.parse(body);
    const task = await baton.submit("baton/ngram", { prompt }, rest);
    return ["application/json", JSON.stringify({ url, taskId: task.id })];
  },
  // A real backend asks here whether this user may read this task.
  "POST /token": async (body) => ["text/plain", (await baton.issueToken(JSON.parse(body).taskId, { ttl: "10m" })).token],
};

const server = createServer(async (request, response) => {
  const route = routes[`${request.method} ${request.url}`];
  if (route === undefined) return response.writeHead(404).end();
  let body = "";
  for await (const piece of request) body += piece;
  try {
    const [type, content] = await route(body);
    response.writeHead(200, { "content-type": type }).end(content);
  } catch (error) {
    const known = error instanceof BatonError;
    response.writeHead(known ? 502 : 500).end(known ? `${error.reason}: ${error.message}` : "internal error");
    console.error(error);
  }
});
server.listen(Number(env.PORT ?? 8000), "127.0.0.1", () => {
  console.log(`open http://127.0.0.1:${server.address().port}`);
});
