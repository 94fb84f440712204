// Builds `dist/`. npm runs it before it packs this folder, and when another project installs it
// (`npm install <this folder>`); then it installs nothing into the folder itself, so that what
// is missing here is installed first.

import { spawnSync } from "node:child_process";
import { existsSync, rmSync } from "node:fs";
import { dirname } from "node:path";
import { env, execPath, exit } from "node:process";
import { fileURLToPath } from "node:url";

const folder = dirname(dirname(fileURLToPath(import.meta.url)));

function run(script, args, options) {
  const { status } = spawnSync(execPath, [script, ...args], { cwd: folder, stdio: ["ignore", "inherit", "inherit"], ...options });
  if (status !== 0) exit(status ?? 1);
}

const npm = env.npm_execpath;
const needed = ["typescript/bin/tsc", "@types/node", "@connectrpc/connect-node"];
if (npm !== undefined && !needed.every((path) => existsSync(`${folder}/node_modules/${path}`))) {
  // What was said of the outer installation, where it goes and what it keeps, is not meant for this one.
  const outer = /^npm_config_(global|location|prefix|local_prefix|global_prefix|save.*|omit|include|install_links|dry_run)$/i;
  const kept = Object.entries(env).filter(([name]) => !outer.test(name) && name !== "NODE_ENV");
  run(npm, ["ci", "--ignore-scripts", "--silent"], { env: Object.fromEntries(kept) });
}
rmSync(`${folder}/dist`, { recursive: true, force: true });
run(`${folder}/node_modules/typescript/bin/tsc`, ["-p", "tsconfig.build.json"]);
