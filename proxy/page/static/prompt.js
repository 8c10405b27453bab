// The box that sends a prompt to the same API as any client, and shows its tokens as they come.

import { byId, phaseBar, seconds } from "./parts.js";

let model = "", takes_chats = true, under_way = null;

// of every request that the page makes; the key is kept nowhere else
export function headers() {
  const key = byId("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

export function openKeyBox() {
  byId("key-box").open = true;
}

export function prepare(state) {
  ({ model, takes_chats } = state);
}

async function send(event) {
  event.preventDefault();
  if (under_way) return;
  under_way = new AbortController();
  toggle(true);
  const answer = byId("answer"), begun = performance.now();
  let first_s = null, last_s = 0, usage = null, record = null, error = "";
  answer.textContent = "";
  byId("answer-bar").replaceChildren();
  status("waiting for the first token");
  try {
    for await (const chunk of chunks(under_way.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices, text = choice?.delta?.content ?? choice?.text;
      if (text) {
        last_s = (performance.now() - begun) / 1000;
        if (first_s === null) status("streaming");
        first_s ??= last_s;
        answer.append(text);
        answer.scrollTop = answer.scrollHeight;
      }
      usage = chunk.usage ?? usage;
      record = chunk.halfmoon?.phases?.[0] ?? record;
    }
  } catch (caught) {
    error = caught.name === "AbortError" ? "stopped" : caught.message;
  }
  under_way = null;
  toggle(false);
  const words = [first_s !== null && `first token after ${seconds(first_s)} here`];
  if (usage?.completion_tokens > 1) words.push(`${usage.completion_tokens} tokens`, `one each ${seconds((last_s - first_s) / (usage.completion_tokens - 1))}`);
  if (usage?.prompt_tokens_details?.cached_tokens) words.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens from the cache`);
  status([error, ...words].filter(Boolean).join(", "));
  if (record) showRecord(record);
}

function showRecord(record) {
  const { queue_s: queue, prefill_queue_s: prefill_queue, prefix_load_s: prefix_load, prefill_s: prefill, write_s: write = 0 } = record;
  const handoff = Math.max(record.ttft_s - write - queue - prefill_queue - prefix_load - prefill, 0);
  byId("answer-bar").replaceChildren(phaseBar({ queue, prefill_queue, prefix_load, prefill, handoff, write }, null, null, record.ttft_s));
}

async function* chunks(signal) {
  const prompt = byId("prompt").value, max_tokens = Number(byId("max-tokens").value) || 128;
  const path = takes_chats ? "/v1/chat/completions" : "/v1/completions";
  const asked = takes_chats ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const reply = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ model, max_tokens, stream: true, stream_options: { include_usage: true }, ...asked }),
    signal,
  });
  if (!reply.ok) {
    const body = await reply.json().catch(() => null);
    throw new Error(body?.error?.message ?? `status ${reply.status}`);
  }
  let rest = "";
  for await (const part of texts(reply.body)) {
    const events = (rest + part).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
    }
  }
}

async function* texts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function toggle(busy) {
  byId("send").disabled = busy;
  byId("stop").disabled = !busy;
}

function status(words) {
  byId("answer-status").textContent = words;
}

byId("try").addEventListener("submit", send);
byId("stop").addEventListener("click", () => under_way?.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
});
