// Small charts as SVG: lines over time, bars.
import { draw, make } from "/static/dom.js";

const WIDTH = 560;
const clock = (ms) => new Date(ms).toISOString().slice(5, 16).replace("T", " ");
const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());

export function lineChart(title, points, { span, low, high, height = 74, marks = [], format = short }) {
  const values = points.map((p) => p[1]);
  let bottom = low ?? Math.min(...values), top = high ?? Math.max(...values);
  if (bottom === top) { bottom -= 1; top += 1; }
  const left = 8, right = 58, upper = 8, lower = 8;
  const x = (t) => left + ((t - span[0]) / Math.max(span[1] - span[0], 1)) * (WIDTH - left - right);
  const y = (v) => upper + (1 - (v - bottom) / (top - bottom)) * (height - upper - lower);
  const last = points[points.length - 1];
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img",
    "aria-label": `${title}: ${points.length} values from ${clock(points[0][0])} to ${clock(last[0])}, last ${format(last[1])}` });
  for (const mark of marks) {
    if (mark.value <= bottom || mark.value >= top) continue;
    svg.append(draw("line", { class: "mark", x1: left, x2: WIDTH - right, y1: y(mark.value), y2: y(mark.value) }),
      draw("text", { class: "mark-label", x: WIDTH - right + 6, y: y(mark.value) + 4 }, mark.label));
  }
  svg.append(draw("polyline", { class: "line", points: points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") }));
  for (const p of points) {
    svg.append(draw("circle", { class: "dot", cx: x(p[0]), cy: y(p[1]), r: 2.5 },
      draw("title", {}, `${clock(p[0])}: ${format(p[1])}`)));
  }
  svg.append(draw("text", { class: "last", x: Math.min(x(last[0]) + 6, WIDTH - right + 6), y: y(last[1]) + 4 }, format(last[1])));
  return make("figure", { class: "chart" }, make("figcaption", {}, title), svg);
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
