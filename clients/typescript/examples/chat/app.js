import { Baton, TaskEndedError } from "baton-client";

const [form, output, pill, figures, stop] = ["form", "output", "pill", "figures", "stop"].map((id) => document.getElementById(id));

async function ask(path, body) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.text();
}

function show(state, text) {
  pill.dataset.state = state;
  pill.textContent = text;
}

async function stream({ url, taskId }, signal) {
  // Asked for again at each connection, so that a long stream outlives its token.
  const baton = new Baton({ url, key: () => ask("/token", { taskId }) });
  const started = performance.now();
  let n = 0;
  const tokens = baton.stream(taskId, {
    signal,
    onReconnect: ({ attempt }) => show("reconnecting", `reconnecting (${attempt})`),
  });
  for await (const token of tokens) {
    if (token.restart) output.replaceChildren();
    show("live", "live");
    const piece = document.createElement("span");
    piece.textContent = token.text;
    piece.dataset.index = token.index;
    output.append(piece);
    n += 1;
    figures.textContent = `${n} tokens, event ${token.sequence}, ${((n * 1000) / (performance.now() - started)).toFixed(0)} per second`;
  }
  const { usage } = await tokens.result();
  show("ended", "complete");
  figures.textContent = `${usage.tokensOut} tokens in ${((performance.now() - started) / 1000).toFixed(1)} s`;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { prompt, tokens, pace, seed } = Object.fromEntries(new FormData(form));
  const leave = new AbortController();
  stop.onclick = () => leave.abort();
  output.replaceChildren();
  show("live", "submitted");
  try {
    const params = { max_tokens: Number(tokens), tokens_per_second: Number(pace) };
    await stream(JSON.parse(await ask("/tasks", { prompt, params, seed: Number(seed) })), leave.signal);
  } catch (error) {
    if (leave.signal.aborted) show("ended", "stopped here; the task goes on");
    else show("failed", error instanceof TaskEndedError ? `${error.reason}: ${error.message}` : String(error));
  }
});
