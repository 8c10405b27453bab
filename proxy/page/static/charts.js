// Latencies of the last minutes as SVG: the median as a line, up to the 99th percentile as a band, the bound of the SLO as a dashed line.

import { about, seconds, span } from "./parts.js";

const HEIGHT = 168, LEFT = 54, RIGHT = 8, TOP = 12, BOTTOM = 24;

function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// the least round number that is at least value
function round_up(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

const LEAST_BINS = 24;

// p50, p99: a value or null for each bin, oldest first; the time before the first value is left out
export function draw(place, name, all_p50, all_p99, bin_s, slo_s) {
  const first = Math.min(all_p50.findIndex((value) => value !== null) >>> 0, all_p50.length - LEAST_BINS);
  const p50 = all_p50.slice(first), p99 = all_p99.slice(first);
  const width = Math.max(place.clientWidth, 200), most = Math.max(...p99.map((value) => value ?? 0));
  const slo_fits = slo_s !== null && slo_s <= Math.max(5 * most, most ? 0 : slo_s);
  const top = round_up(Math.max(most, slo_fits ? slo_s * 1.1 : 0) || 0.1);
  const x = (bin) => LEFT + ((width - LEFT - RIGHT) * bin) / (p50.length - 1);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / top;
  const latest = p50.findLast((value) => value !== null);
  const words = latest === undefined ? "no request" : `median up to ${seconds(Math.max(...p50))}, 99th percentile up to ${seconds(most)}`;
  const label = `${name} over the last ${span(bin_s * p50.length)}: ${words}${slo_s === null ? "" : `, bound ${seconds(slo_s)}`}`;
  const chart = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": label });

  for (const share of [0, 0.5, 1]) {
    const at = y(share * top);
    chart.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    chart.append(svg("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end" }, share ? about(share * top) : "0"));
  }
  const minutes = (bin_s * p50.length) / 60;
  for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    const text = share === 1 ? "now" : `${Number((minutes * (1 - share)).toFixed(1))} min ago`;
    chart.append(svg("text", { x: x(share * (p50.length - 1)), y: HEIGHT - 6, "text-anchor": anchor }, text));
  }
  for (const [from, to] of runs(p50)) {
    const bins = Array.from({ length: to - from }, (_, index) => from + index);
    const low = bins.map((bin) => `${x(bin)},${y(p50[bin])}`), high = bins.map((bin) => `${x(bin)},${y(p99[bin])}`);
    if (bins.length === 1) {
      chart.append(svg("line", { class: "p99", x1: x(from), x2: x(from), y1: y(p50[from]), y2: y(p99[from]) }));
      chart.append(svg("circle", { class: "dot", cx: x(from), cy: y(p50[from]), r: 2 }));
      continue;
    }
    chart.append(svg("polygon", { class: "band", points: [...low, ...high.reverse()].join(" ") }));
    chart.append(svg("polyline", { class: "p99", points: high.join(" ") }), svg("polyline", { class: "p50", points: low.join(" ") }));
  }
  if (slo_fits) {
    chart.append(svg("line", { class: "slo", x1: LEFT, x2: width - RIGHT, y1: y(slo_s), y2: y(slo_s) }));
    chart.append(svg("text", { class: "slo-name", x: LEFT + 6, y: y(slo_s) - 5 }, `SLO ${about(slo_s)}`));
  }
  place.replaceChildren(chart);
}

// [first, last + 1] of each run of bins that have a value
function runs(values) {
  const found = [];
  values.forEach((value, bin) => {
    if (value === null) return;
    const last = found.at(-1);
    if (last && last[1] === bin) last[1] = bin + 1;
    else found.push([bin, bin + 1]);
  });
  return found;
}
