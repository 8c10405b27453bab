// Elements and words that all parts of the page use. Text is only ever set as text: nothing here is parsed as HTML.

export const PHASES = [
  ["queue", "queue in the proxy"], ["prefill_queue", "queue at prefill"], ["prefix_load", "load of cached prefix"],
  ["prefill", "prefill"], ["handoff", "hand-off"], ["write", "write"],
];

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// value in seconds; null: not known
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1e3)} ms`;
  return value < 10 ? `${value.toFixed(2)} s` : value < 600 ? `${value.toFixed(0)} s` : span(value);
}

// of a bound or an axis: 1 s, not 1.00 s
export const about = (value) => seconds(value).replace(/\.0+ /, " ");

export function span(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

export const percent = (ratio) => `${(100 * ratio).toFixed(ratio > 0 && ratio < 0.1 ? 1 : 0)} %`;

// three digits: 950, 12.3k, 4.56M
export function count(value) {
  const [scaled, unit] = value >= 1e9 ? [value / 1e9, "G"] : value >= 1e6 ? [value / 1e6, "M"] : value >= 1e4 ? [value / 1e3, "k"] : [value, ""];
  return unit ? `${Number(scaled.toPrecision(3))}${unit}` : String(value);
}

export function bytes(value) {
  const power = Math.min(Math.floor(Math.log2(Math.max(value, 1)) / 10), 5);
  return `${Number((value / 1024 ** power).toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
}

// columns: [title, class, cell of an item]; a cell is text or a node
export function table(label, columns, items) {
  const heads = columns.map(([title, kind]) => make("th", { role: "columnheader", scope: "col", class: kind }, title));
  const rows = items.map((item) => make("tr", { role: "row" }, ...columns.map(([title, kind, cell]) => (
    make("td", { role: "cell", class: kind, "data-name": title }, cell(item))
  ))));
  return make("table", { role: "table", "aria-label": label },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), make("tbody", { role: "rowgroup" }, ...rows));
}

// parts: [class, share of the whole, what it is]
export function bar(label, parts, mark = null) {
  const found = make("div", { class: "bar", role: "img", "aria-label": label, title: label });
  for (const [kind, share] of parts) {
    const part = make("i", { class: kind });
    part.style.width = `${100 * Math.min(share, 1)}%`;
    if (share > 0) found.append(part);
  }
  if (mark !== null && mark <= 1) {
    const line = make("span", { class: "mark" });
    line.style.left = `calc(${100 * mark}% - 2px)`;
    found.append(line);
  }
  return found;
}

// phases: name -> seconds. so_far_s: of a request that still waits for its first token, else null
export function phaseBar(phases, so_far_s, slo_s, scale_s) {
  const known = PHASES.map(([name, words]) => [name, phases[name], words]).filter(([, value]) => value > 0);
  const rest = so_far_s === null ? 0 : Math.max(so_far_s - known.reduce((sum, [, value]) => sum + value, 0), 0);
  const words = known.map(([, value, name]) => `${name} ${seconds(value)}`);
  if (so_far_s !== null) words.push(`waiting for ${seconds(so_far_s)} so far`);
  if (slo_s !== null) words.push(`bound ${seconds(slo_s)}`);
  const parts = [...known.map(([name, value]) => [name, value / scale_s]), ["so-far", rest / scale_s]];
  return bar(words.join(", "), parts, slo_s === null ? null : slo_s / scale_s);
}
