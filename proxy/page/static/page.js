// Reads /page/state each second while the page is seen, and draws it.

import { draw } from "./charts.js";
import { about, bar, byId, bytes, count, make, percent, PHASES, phaseBar, seconds, span, table } from "./parts.js";
import { headers, openKeyBox, prepare } from "./prompt.js";

const EACH_MS = 1000, PATIENCE_MS = 5000;
let latest = null, failing_since = 0, paused = false, timer = 0;

async function look() {
  clearTimeout(timer);
  if (paused || document.hidden) return;
  try {
    const reply = await fetch("/page/state", { headers: headers(), signal: AbortSignal.timeout(PATIENCE_MS) });
    if (reply.status === 401 || reply.status === 403) {
      trouble("This server shows its state only to those with a key. Enter yours under “API key”.");
      openKeyBox();
    } else if (!reply.ok) {
      throw new Error(`status ${reply.status}`);
    } else {
      latest = await reply.json();
      failing_since = 0;
      trouble("");
      show(latest);
    }
  } catch {
    failing_since ||= Date.now();
    const since = latest ? ` What you see is ${span((Date.now() - failing_since) / 1000)} old.` : "";
    trouble(`The proxy does not answer.${since} The page tries again each second.`);
  }
  timer = setTimeout(look, EACH_MS);
}

function trouble(words) {
  document.body.classList.toggle("stale", Boolean(words));
  byId("trouble").hidden = !words;
  if (byId("trouble").textContent !== words) byId("trouble").textContent = words;
  if (words) health("bad", "no data");
}

function health(kind, words) {
  const pill = byId("health");
  pill.className = `pill ${kind}`;
  if (pill.textContent !== words) pill.textContent = words;
}

function show(state) {
  byId("model").textContent = `${state.model} · up ${span(state.up_s)} · ${state.policy}, admission ${state.admission}`;
  byId("about").textContent = `Halfmoon ${state.version} · up to ${count(state.max_model_len)} tokens a request · the same in a terminal: halfmoon status, halfmoon explain ID`;
  const avoided = state.members.filter((member) => member.avoided).length, gone = state.absences.length;
  if (state.missing.length) health("bad", state.missing[0]);
  else if (state.draining) health("warn", "draining");
  else if (gone || avoided) health("warn", [gone && `${gone} gone`, avoided && `${avoided} avoided`].filter(Boolean).join(", "));
  else health("good", "serving");
  showFigures(state);
  showLatency("ttft", "Time to first token", 0, state);
  showLatency("tpot", "Time per output token", 2, state);
  byId("requests").replaceChildren(requests(state));
  byId("workers").replaceChildren(workers(state));
  byId("kv").replaceChildren(...tiers(state));
  prepare(state);
}

function showFigures(state) {
  const sum = (rows, column) => rows.reduce((total, row) => total + row[column], 0);
  const minute = state.bins.slice(-Math.round(60 / state.bin_s));
  const good = sum(state.bins, 4), all = good + sum(state.bins, 5);
  const has_slo = state.slo.ttft_s !== null || state.slo.tpot_s !== null;
  byId("waiting").textContent = count(state.num_waiting);
  byId("running").textContent = count(state.num_running);
  byId("rate").textContent = count(sum(minute, 4) + sum(minute, 5));
  byId("in-slo-name").textContent = `${has_slo ? "In SLO" : "Without an error"}, last 10 minutes`;
  byId("in-slo").textContent = all ? percent(good / all) : "–";
}

function showLatency(name, title, column, state) {
  const found = state.latest[`${name}_s`], slo_s = state.slo[`${name}_s`];
  const words = found
    ? `median ${seconds(found.p50)}, 99th percentile ${seconds(found.p99)} of the last ${count(found.count)} requests`
    : "no request yet";
  byId(`${name}-figures`).textContent = slo_s === null ? words : `${words} · SLO ${about(slo_s)}`;
  draw(byId(`${name}-chart`), title, state.bins.map((row) => row[column]), state.bins.map((row) => row[column + 1]), state.bin_s, slo_s);
}

function requests(state) {
  const waits = (request) => request.ttft_s === null && state.under_way.includes(request);
  const reach = (request) => request.ttft_s ?? (waits(request) ? request.age_s : 0);
  const items = [...state.under_way, ...state.ended];
  if (!items.length) return make("p", { class: "quiet" }, "None yet. Send a prompt below.");
  const longest = Math.max(...items.map(reach)) || 0.001;
  const bounds = items.map((request) => request.ttft_slo_s ?? 0).filter((bound) => bound <= 2 * longest);
  const scale = Math.max(longest, ...bounds) * 1.001;
  const missed = (value, bound) => value !== null && bound !== null && value > bound;
  const timed = (value, bound) => make("span", missed(value, bound) ? { class: "bad", title: `bound ${seconds(bound)}` } : {}, seconds(value) + (missed(value, bound) ? " !" : ""));
  const bad = (request) => request.state === "failed" || request.state === "rejected";
  return table("Requests, newest first", [
    ["state", "", (request) => make("span", { class: bad(request) ? "bad" : state.under_way.includes(request) ? "" : "quiet" }, bad(request) ? `${request.state}: ${request.reason}` : request.state)],
    ["id", "id", (request) => make("span", { title: request.id }, request.id.length > 14 ? `${request.id.slice(0, 13)}…` : request.id)],
    ["tokens", "num", (request) => `${count(request.num_prompt_tokens)} → ${count(request.num_tokens)}`],
    ["workers", "id less", (request) => route(request)],
    ["to first token", "where", (request) => phaseBar(request.phases, waits(request) ? request.age_s : null, request.ttft_slo_s, scale)],
    ["TTFT", "num", (request) => timed(request.ttft_s, request.ttft_slo_s)],
    ["TPOT", "num", (request) => timed(request.tpot_s, request.tpot_slo_s)],
    ["total", "num", (request) => seconds(request.e2e_s ?? (state.under_way.includes(request) ? request.age_s : null))],
  ], items);
}

function route({ prefill, decode, num_attempts }) {
  const way = !decode ? "–" : prefill === decode ? decode : `${prefill} → ${decode}`;
  return num_attempts > 1 ? `${way}, attempt ${num_attempts}` : way;
}

function workers(state) {
  const here = state.members.filter((member) => member.role !== "store");
  const gone = state.absences.map((absence) => ({ ...absence, gone: true }));
  const live = (cell) => (member) => (member.gone ? "–" : cell(member));
  if (!here.length && !gone.length) return make("p", { class: "quiet" }, "None has joined yet.");
  const found = table("Workers", [
    ["worker", "id", (member) => make("span", {}, member.id, make("div", { class: "quiet" }, member.gone ? "" : [member.device, `up ${span(member.up_s)}`].filter(Boolean).join(", ")))],
    ["role", "", (member) => make("span", { title: member.role_reason ?? "" }, member.role)],
    ["state", "", condition],
    ["running", "num", live((member) => count(member.num_running))],
    ["waiting", "num", live((member) => count(member.num_waiting))],
    ["tokens", "num", live((member) => count(member.num_tokens))],
  ], [...here, ...gone]);
  const more = state.num_members - state.members.length;
  const notes = more > 0 ? [`and ${more} more`] : [];
  for (const change of state.role_changes) {
    notes.push(`${span(change.for_s)} ago: ${change.id} ${change.failed ? "did not become" : "became"} ${change.role}: ${change.reason}`);
  }
  return make("div", {}, found, ...notes.map((words) => make("p", { class: "quiet" }, words)));
}

function condition(member) {
  if (member.gone) return make("span", { class: "bad" }, `gone for ${span(member.for_s)}`);
  if (!member.avoided) return make("span", { class: "good" }, "serves");
  const why = member.silent_s >= 1 ? `silent for ${seconds(member.silent_s)}` : member.step_age_s >= 1 ? `one step for ${seconds(member.step_age_s)}` : "too slow";
  return make("span", { class: "warn" }, `avoided: ${why}`);
}

function tiers(state) {
  const workers = state.members.filter((member) => member.role !== "store"), stores = state.members.filter((member) => member.role === "store");
  const disks = stores.filter((store) => store.ssd_bytes > 0);
  const of = (member, ratio) => (member.kv_capacity_tokens ? `${percent(ratio)} of ${count(member.kv_capacity_tokens)} tokens` : percent(ratio));
  const row = (member, words, parts) => make("div", { class: "use" }, make("span", { class: member.avoided ? "id warn" : "id" }, member.id + (member.avoided ? ": avoided" : "")), bar(`${member.id}: ${words}`, parts), make("span", {}, words));
  const tier = (title, rows, none) => [make("div", { class: "tier" }, title), ...(rows.length ? rows : [make("div", { class: "quiet" }, none)])];
  return [
    ...tier("Workers' pages (HBM)", workers.map((member) => row(member, of(member, member.kv_used), [["leased", member.kv_used]])), "no worker"),
    ...tier("Arena (shared memory)", stores.map((store) => {
      const words = `${of(store, store.kv_used)}${store.kv_leased ? `, ${percent(store.kv_leased)} held` : ""}`;
      return row(store, words, [["leased", store.kv_leased], ["cached", store.kv_used - store.kv_leased]]);
    }), "no store"),
    ...tier("SSD", disks.map((store) => {
      const share = store.ssd_used_bytes / store.ssd_bytes;
      return row(store, `${percent(share)} of ${bytes(store.ssd_bytes)}`, [["cached", share]]);
    }), "none (store.ssd_path)"),
  ];
}

byId("legend").replaceChildren(
  ...PHASES.map(([name, words]) => make("li", {}, make("i", { class: name }), words)), make("li", {}, make("i", { class: "so-far" }), "under way"),
);
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
  look();
});
document.addEventListener("visibilitychange", look);
window.addEventListener("resize", () => latest && show(latest));
byId("key").addEventListener("change", look);
look();
