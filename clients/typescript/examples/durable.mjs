// A task that outlives its reader: the second reader goes on where the first one left.
import { Baton, TaskEndedError } from "baton-client";

const baton = new Baton();
const task = await baton.submit(
  "baton/ngram",
  { prompt: "Call me" },
  { requestId: `order-${process.argv[2] ?? Date.now()}`, deadline: "2m", params: { max_tokens: 30 } },
);
console.error(`task ${task.id}, place ${task.submitted?.queuePosition} in the queue`);

const first = task.tokens();
let n = 0;
for await (const token of first) {
  process.stdout.write(token.text);
  if (++n === 10) break; // the task goes on
}
const saved = first.nextSequence; // keep it in a database, or in the page's storage

for await (const token of task.tokens({ from: saved, onReconnect: ({ error }) => console.error(error.message) })) {
  if (token.restart) process.stdout.write("\n(again from the beginning)\n");
  process.stdout.write(token.text);
}
try {
  const { usage } = await task.result();
  console.log(`\n${usage?.tokensOut} tokens`);
} catch (error) {
  if (!(error instanceof TaskEndedError)) throw error;
  console.error(`\n${error.reason}: ${error.message}`);
  process.exitCode = 1;
}
