// Submits a task and prints its tokens: node examples/stream.mjs "Alice was beginning to"
import { Baton } from "baton-client";

const baton = new Baton(); // BATON_ADDRESS and BATON_API_KEY, or the local `baton dev`
const prompt = process.argv[2] ?? "Alice was beginning to";
for await (const token of baton.run("baton/ngram", { prompt })) process.stdout.write(token.text);
console.log();
