// Small charts as SVG: values over time with axes, bars.
import { draw, make } from "/static/dom.js";

const HOUR = 3600000, STEPS = [1, 2, 3, 6, 12, 24, 48, 72, 168, 336, 720, 2160, 8760];
export const clock = (ms) => new Date(ms).toISOString().slice(0, 16).replace("T", " ");
const figures = (value, digits) => (Math.abs(value) >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : Number(value.toPrecision(digits)).toString());
export const short = (value) => figures(value, 3);
const exact = (value) => figures(value, 6); // two ticks never have one label

// round values between two bounds, two to five of them
function ticks(bottom, top) {
  const rough = (top - bottom) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((s) => s >= rough);
  const first = Math.ceil(bottom / step - 1e-9);
  return Array.from({ length: Math.floor(top / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function times(from, to) {
  const step = (STEPS.find((hours) => (to - from) / (hours * HOUR) <= 4) ?? STEPS[STEPS.length - 1]) * HOUR;
  const found = [];
  for (let t = Math.ceil(from / step) * step; t <= to && found.length < 9; t += step) found.push(t);
  const label = (t) => (step >= 24 * HOUR || t % (24 * HOUR) === 0 ? new Date(t).toISOString().slice(5, 10) : new Date(t).toISOString().slice(11, 16));
  return found.map((t) => [t, label(t)]);
}

// points: [milliseconds, value or null, low, high]; null breaks the line; low to high is the range of healthy people
export function lineChart(title, points, { span, unit = "", width = 330, height = 120, low, high, marks = [], format = short, tick = exact, note = "", latest = true }) {
  const known = points.filter((p) => p[1] !== null);
  const ranges = known.filter((p) => Number.isFinite(p[2]) && Number.isFinite(p[3]));
  const values = known.flatMap((p) => [p[1], p[2], p[3]]).filter((v) => Number.isFinite(v));
  let bottom = low ?? Math.min(...values), top = high ?? Math.max(...values);
  if (!(bottom < top)) { bottom -= Math.abs(bottom) * 0.1 || 1; top += Math.abs(top) * 0.1 || 1; }
  else if (low === undefined) { const rim = (top - bottom) * 0.06; bottom -= rim; top += rim; }
  if (unit === "%" && Math.max(...values) <= 100) top = Math.min(top, 100);
  const left = 44, right = 12, upper = 8, lower = 20;
  const x = (t) => left + ((t - span[0]) / Math.max(span[1] - span[0], 1)) * (width - left - right);
  const y = (v) => upper + (1 - (v - bottom) / (top - bottom)) * (height - upper - lower);
  const last = known[known.length - 1];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${title}: ${known.length} values from ${clock(points[0][0])} to ${clock(points[points.length - 1][0])} UTC, last ${last ? `${format(last[1])} ${unit}` : "unknown"}` });
  for (let i = 0; i < ranges.length; i++) { // each range holds until the next measurement
    const [from, until] = [x(ranges[i][0]), i + 1 < ranges.length ? x(ranges[i + 1][0]) : width - right];
    svg.append(draw("rect", { class: "band", x: i ? from : left, width: Math.max(until - (i ? from : left), 1), y: y(Math.min(ranges[i][3], top)), height: Math.max(y(Math.max(ranges[i][2], bottom)) - y(Math.min(ranges[i][3], top)), 0) }));
  }
  for (const value of ticks(bottom, top)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      draw("text", { class: "tick", x: left - 5, y: y(value) + 4, "text-anchor": "end" }, tick(value)));
  }
  for (const [time, label] of times(...span)) {
    svg.append(draw("line", { class: "grid", x1: x(time), x2: x(time), y1: height - lower, y2: height - lower + 4 }),
      draw("text", { class: "tick", x: x(time), y: height - 5, "text-anchor": x(time) > width - right - 16 ? "end" : "middle" }, label));
  }
  svg.append(draw("path", { class: "axis", d: `M${left} ${upper}V${height - lower}H${width - right}` }));
  const labels = []; // above the line
  for (const mark of marks) {
    if (mark.value <= bottom || mark.value >= top) continue;
    svg.append(draw("line", { class: "mark", x1: left, x2: width - right, y1: y(mark.value), y2: y(mark.value) }));
    labels.push(draw("text", { class: "mark-label", x: mark.at === "end" ? width - right - 4 : left + 4, "text-anchor": mark.at ?? "start", y: y(mark.value) - 3 }, mark.label));
  }
  let path = "", pen = "M";
  for (const p of points) {
    if (p[1] === null) pen = "M"; else { path += `${pen}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`; pen = "L"; }
  }
  svg.append(draw("path", { class: "line", d: path }));
  for (const p of points) {
    const outside = (Number.isFinite(p[2]) && p[1] < p[2]) || (Number.isFinite(p[3]) && p[1] > p[3]);
    if (p[1] === null) svg.append(draw("text", { class: "unknown-mark", x: x(p[0]), y: height - lower - 4, "text-anchor": "middle" }, "?", draw("title", {}, `${clock(p[0])} UTC: unknown`)));
    else svg.append(draw("circle", { class: outside ? "dot outside" : "dot", cx: x(p[0]), cy: y(p[1]), r: 2.6 }, draw("title", {}, `${clock(p[0])} UTC: ${format(p[1])} ${unit}`)));
  }
  svg.append(...labels);
  return make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), unit ? ` in ${unit}` : "", last && latest ? make("span", { class: "last" }, `${format(last[1])}`) : null, note ? make("small", {}, ` ${note}`) : null), svg);
}

export function bars(rows, unit = "") {
  const most = Math.max(...rows.map((row) => row.value), 1);
  if (!rows.length) return make("p", { class: "quiet" }, "none so far");
  return make("table", { class: "bars" }, make("tbody", {}, ...rows.map((row) =>
    make("tr", {}, make("th", { scope: "row" }, row.label),
      make("td", {}, bar(row.value / most, row.kind)), make("td", { class: "number" }, `${row.value.toLocaleString("en")}${unit}`)))));
}

function bar(share, kind) {
  return draw("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { class: `bar ${kind || ""}`, width: Math.max(100 * share, share > 0 ? 1 : 0), height: 10 }));
}
