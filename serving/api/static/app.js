// The page: scores observations, shows each visit's risk with its reasons and charts, and the state of the service.
import { bars, clock, lineChart, short } from "/static/charts.js";
import { make } from "/static/dom.js";
import { parseObservations, visitKey } from "/static/observations.js";

const $ = (id) => document.getElementById(id);
const ORDER = { HIGH: 0, MEDIUM: 1, UNKNOWN: 2, LOW: 3 }; // an unknown risk may be a high one
const SIGNS = { HIGH: "▲▲", MEDIUM: "▲", LOW: "●", UNKNOWN: "?" };
const WHY = { insufficient_evidence: "too little measured", stale: "data too old", nothing_usable: "nothing usable" };
const DETAILS = "explain=6&trajectory=16&series=1", MOST = 16; // of each visit
let model = null, scored = [], given = [], moment = "now";

export const percent = (p) => (p === null ? "no score" : p < 0.001 ? "< 0.1%" : p > 0.999 ? "> 99.9%" : `${(100 * p).toFixed(p < 0.1 || p > 0.99 ? 1 : 0)}%`);
const ago = (hours) => (hours < 1 ? `${Math.round(hours * 60)} min` : hours < 72 ? `${Math.round(hours)} h` : `${Math.round(hours / 24).toLocaleString("en")} days`);

async function ask(path, options = {}) {
  const key = $("key").value.trim();
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 || answer.status === 403) $("key-label").hidden = false;
  return answer;
}

function say(text, kind = "") { $("status").textContent = text; $("status").className = kind; }

// ------------------------------------------------------------------------------------------------- scoring

// nothing of the visits before stays where the next ones cannot be read or scored
function clear() {
  [scored, given] = [[], []];
  for (const id of ["remarks", "visits", "detail", "count"]) $(id).replaceChildren();
  $("results").hidden = true;
}

async function score(text) {
  clear();
  moment = $("moment").value;
  let observations;
  try { observations = parseObservations(text); } catch (error) { return say(`These observations cannot be read: ${error.message}`, "bad"); }
  say(`Scoring ${observations.length.toLocaleString("en")} observations …`);
  const n = new Set(observations.filter((row) => row).map(visitKey)).size;
  const [answer, body] = await predict(observations, n * MOST <= (model?.limits.visits ?? 2000)); // else when a visit is opened
  clear(); // an earlier answer may have come meanwhile
  if (!answer) return say("The service does not answer.", "bad");
  if (!answer.ok) {
    asideRemarks(body.set_aside);
    return say(body.detail, "bad");
  }
  given = observations;
  scored = body.predictions.sort((a, b) => ORDER[a.risk_level] - ORDER[b.risk_level] || (b.sepsis_probability ?? -1) - (a.sepsis_probability ?? -1));
  const unused = Object.entries(body.unused_codes).map(([code, rows]) => `${code} (${rows.toLocaleString("en")})`);
  if (unused.length) $("remarks").append(make("li", {}, `Codes that the model does not use, with their numbers of observations: ${unused.join(", ")}`));
  if (body.warnings.length) $("remarks").append(make("li", {}, make("details", {}, make("summary", {}, "For the data team"), ...body.warnings.map((text) => make("p", {}, text)))));
  asideRemarks(body.set_aside);
  say("");
  $("version").textContent = `model ${body.model_version}`;
  showVisits();
}

// [answer, body], or [null] where none comes
async function predict(observations, details) {
  try {
    const answer = await ask(`/predict?as_of=${encodeURIComponent(moment)}${details ? `&${DETAILS}` : ""}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(observations) });
    return [answer, await answer.json()];
  } catch { return [null]; }
}

// reasons, scores over time and observations of one visit of many
async function addDetails(p) {
  if (p.series) return;
  const [answer, body] = await predict(given.filter((row) => row && visitKey(row) === visitKey(p)), true);
  if (answer?.ok) for (const name of ["reasons", "trajectory", "series"]) p[name] = body.predictions[0][name];
}

function asideRemarks(aside) {
  for (const r of aside?.reasons || []) {
    const rows = r.first_rows.length ? ` (${r.count > 1 ? "rows" : "row"} ${r.first_rows.map((n) => n + 1).join(", ")}${r.count > r.first_rows.length ? ", …" : ""})` : "";
    $("remarks").append(make("li", {}, `${r.count.toLocaleString("en")} not used: ${r.meaning}${rows}`));
  }
}

function showVisits() {
  const count = (level) => scored.filter((p) => p.risk_level === level).length;
  $("count").textContent = `${scored.length} ${scored.length === 1 ? "visit" : "visits"}: ${Object.keys(ORDER).map((l) => `${count(l)} ${l}`).join(", ")}`;
  $("visits").replaceChildren(...scored.map((p, i) => make("li", {},
    make("button", { type: "button", class: `visit ${p.risk_level} ${p.reason || ""}`, "data-index": i },
      make("span", { class: "badge" }, make("span", { "aria-hidden": "true" }, `${SIGNS[p.risk_level]} `), p.risk_level),
      make("span", { class: "who" }, `visit ${p.visit_id}`, make("small", {}, `${p.client}`)),
      make("span", { class: "p" }, p.reason ? WHY[p.reason] : percent(p.sepsis_probability))))));
  $("results").hidden = false;
  if (scored.length) showDetail(0, false);
}

async function showDetail(index, focus = true) {
  const p = scored[index];
  for (const button of $("visits").querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.index === String(index));
  await addDetails(p);
  if ($("visits").querySelector("[aria-pressed=true]")?.dataset.index !== String(index) || scored[index] !== p) return; // another one was opened meanwhile
  const box = $("detail");
  const horizon = model && !model.retrospective && model.horizon_hours ? ` within ${model.horizon_hours} h` : "";
  const newest = p.hours_since_newest === null ? "" : `; newest observation that the model uses: ${clock(Date.parse(p.newest_observation))} UTC, ${ago(p.hours_since_newest)} before`;
  box.replaceChildren(make("h3", {}, `Visit ${p.visit_id}, ${p.client}`),
    make("p", { class: `headline ${p.risk_level} ${p.reason || ""}` },
      make("span", { class: "badge" }, make("span", { "aria-hidden": "true" }, `${SIGNS[p.risk_level]} `), p.reason ? "risk UNKNOWN" : `${p.risk_level} risk`),
      p.reason ? ` ${p.reason_text[0].toUpperCase()}${p.reason_text.slice(1)}. ` : ` ${percent(p.sepsis_probability)} probability of sepsis${horizon}`,
      p.reason ? make("b", {}, "This does not mean that the risk is low.") : null),
    make("p", { class: "quiet" }, `${p.as_of ? `as of ${clock(Date.parse(p.as_of))} UTC; ` : ""}${p.num_observations.toLocaleString("en")} observations that the model uses${newest}`));
  if (p.reasons?.length) {
    box.append(make("h4", {}, "Strongest reasons"), make("ul", { class: "reasons" }, ...p.reasons.map((r) =>
      make("li", { class: r.contribution > 0 ? "up" : "down", title: r.feature }, make("span", { class: "sign" }, r.contribution > 0 ? "raises" : "lowers"), ` ${r.text}`))));
  }
  const series = (p.series || []).map((own) => ({ ...own, points: own.points.map(([time, ...rest]) => [Date.parse(time), ...rest]) }));
  const times = series.flatMap((own) => own.points.map((point) => point[0]));
  const [first, last] = [Math.min(...times), Math.max(...times)];
  // a moment long after the last observation would press all others together
  const scores = (p.trajectory || []).map((q) => [Date.parse(q.as_of), q.sepsis_probability]).filter((q) => q[0] <= last + (last - first) / 4);
  if (times.length) box.append(...charts(series, scores, [first, Math.max(last, ...scores.map((point) => point[0]))], !p.reason));
  if (focus) { box.focus({ preventScroll: true }); if (box.getBoundingClientRect().top > innerHeight * 0.6 || box.getBoundingClientRect().top < 0) box.scrollIntoView({ block: "start" }); }
}

// the score over time, then a chart of every code; a code with one value is a line of text
function charts(series, scores, span, now) {
  const out = [];
  if (scores.some((point) => point[1] !== null)) {
    const levels = model ? [{ value: model.risk_thresholds.medium, label: "MEDIUM", at: "end" }, { value: model.risk_thresholds.high, label: "HIGH" }] : [];
    const top = Math.min(1, 1.15 * Math.max(...scores.map((point) => point[1] ?? 0), ...levels.map((level) => level.value)));
    out.push(make("h4", {}, now ? "Score over time" : "Earlier scores"), lineChart("probability of sepsis", scores, { span, width: innerWidth < 600 ? 330 : 520, height: 150, low: 0, high: top, marks: levels, latest: now, format: percent, tick: (v) => `${short(100 * v)}%` }));
  }
  const measured = (own) => (own.points.length > 1
    ? lineChart(`${own.name}${own.name === own.code ? "" : ` (${own.code})`}`, own.points, { span, unit: own.unit, note: own.points.some((p) => Number.isFinite(p[2])) ? "band: reference range" : "" })
    : make("p", { class: "single" }, make("b", {}, own.name), `${own.name === own.code ? "" : ` (${own.code})`} ${short(own.points[0][1])} ${own.unit}`, make("small", {}, ` ${clock(own.points[0][0])} UTC`)));
  const inOrder = (list) => [...list].sort((a, b) => (b.points.length > 1) - (a.points.length > 1));
  const [used, unused] = [inOrder(series.filter((own) => own.used)), inOrder(series.filter((own) => !own.used))];
  if (used.length) out.push(make("h4", {}, "What was measured"), make("div", { class: "charts" }, ...used.map(measured)));
  if (unused.length) out.push(make("details", {}, make("summary", {}, `Not used by the model: ${unused.map((own) => own.name).join(", ")}`), make("div", { class: "charts" }, ...unused.map(measured))));
  return out;
}

$("visits").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) showDetail(Number(button.dataset.index));
});
$("input").addEventListener("submit", (event) => { event.preventDefault(); score($("data").value); });
$("demo").addEventListener("click", async () => {
  const text = await (await fetch("/demo-patients")).text();
  $("data").value = text;
  $("moment").value = "last"; // they are patients of 2024
  score(text);
});
const readFile = async (file) => { if (file) { const text = await file.text(); $("data").value = text.length > 200000 ? `${file.name}: ${file.size.toLocaleString("en")} bytes` : text; score(text); } };
$("file").addEventListener("change", (event) => readFile(event.target.files[0]));
for (const kind of ["dragover", "drop"]) {
  $("data").addEventListener(kind, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    if (kind === "drop") readFile(event.dataTransfer.files[0]);
  });
}

// ------------------------------------------------------------------------------------------------- service

async function loadModel() {
  const answer = await ask("/model").catch(() => null);
  if (!answer?.ok) return;
  model = await answer.json();
  $("version").textContent = `model ${model.model_version}`;
  $("synthetic").hidden = !model.synthetic;
  $("retrospective").hidden = !model.retrospective;
}

function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? ([\d.eE+-]+|NaN|\+Inf)$/.exec(line);
    if (match) found.push({ name: match[1], labels: Object.fromEntries([...(match[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]])), value: Number(match[3]) });
  }
  return found;
}

async function showService() {
  await loadModel();
  const answer = await ask("/metrics").catch(() => null);
  if (!answer?.ok) { $("requests").replaceChildren(make("p", { class: "bad" }, answer?.status === 401 || answer?.status === 403 ? "needs an API key" : "not available")); return; }
  const all = samples(await answer.text());
  const of = (name) => all.filter((s) => s.name === name);
  const edges = of("sepsis_score_bucket").map((s) => ({ le: Number(s.labels.le.replace("+Inf", "Infinity")), n: s.value })).sort((a, b) => a.le - b.le);
  let below = 0;
  $("scores").replaceChildren(bars(edges.filter((e) => e.le <= 1).map((e, i, list) => {
    const row = { label: `${i ? `${list[i - 1].le}–` : "up to "}${e.le}`, value: e.n - below };
    below = e.n;
    return row;
  })));
  $("levels").replaceChildren(bars(of("sepsis_predictions_total").map((s) => ({ label: `${SIGNS[s.labels.risk_level] || ""} ${s.labels.risk_level}`, value: s.value, kind: s.labels.risk_level }))));
  $("unknown").replaceChildren(bars(of("sepsis_unknown_risk_total").map((s) => ({ label: WHY[s.labels.reason] || s.labels.reason, value: s.value }))));
  $("requests").replaceChildren(bars(of("sepsis_requests_total").filter((s) => !s.labels.route.startsWith("/static")).map((s) => ({ label: `${s.labels.route} ${s.labels.status}`, value: s.value, kind: s.labels.status >= "400" ? "HIGH" : "" })).sort((a, b) => b.value - a.value).slice(0, 12)));
  $("aside").replaceChildren(bars(of("sepsis_rows_set_aside_total").map((s) => ({ label: s.labels.reason.replaceAll("_", " "), value: s.value }))));
  if (!model) return;
  const interval = (m) => (m ? `${m.value.toFixed(3)} (${m.interval.map((v) => v.toFixed(3)).join(" to ")})` : "–");
  const test = model.metrics.test || {};
  const figure = (name) => (test[name]?.value !== undefined ? interval(test[name]) : typeof test[name] === "number" ? test[name].toFixed(3) : "–");
  const rows = [["version", model.model_version], ["features", `${model.n_features} (feature set ${model.feature_set})`], ["model", model.model],
    ["predicts", model.retrospective ? "nothing ahead: scores whole stays" : `sepsis within ${model.horizon_hours} h`], ["trained", model.trained_at ? `${clock(Date.parse(model.trained_at))} UTC` : null], ["on", model.trained_on],
    ["risk levels", `MEDIUM from ${percent(model.risk_thresholds.medium)}, HIGH from ${percent(model.risk_thresholds.high)}`],
    ["needs", minimum(model.minimum_evidence)], ["ROC AUC, test part", figure("roc_auc")], ["average precision, test part", figure("average_precision")]];
  const site = Object.entries(model.site_codes).map(([code, [concept, unit]]) => make("tr", {}, make("th", { scope: "row" }, code), make("td", {}, `${concept.replaceAll("_", " ")}${unit ? `, in ${unit}` : ""}`)));
  $("site").replaceChildren(site.length ? make("table", { class: "bars" }, make("tbody", {}, ...site)) : make("p", { class: "quiet" }, "None. SEPSIS_CODES or --codes names a file."));
  $("card").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value ?? "–"))]));
}

const minimum = (m) => (m ? `${m.at_least} of ${m.inputs.map((name) => name.replaceAll("_", " ")).join(", ")} within ${m.within_hours} h, the newest of them at most ${m.newest_hours} h old` : "any observation");

function show(view) {
  for (const name of ["patients", "service"]) {
    $(name).hidden = name !== view;
    if (name === view) $(`tab-${name}`).setAttribute("aria-current", "page"); else $(`tab-${name}`).removeAttribute("aria-current");
  }
  if (view === "service") showService();
}
$("tab-patients").addEventListener("click", () => show("patients"));
$("tab-service").addEventListener("click", () => show("service"));
$("refresh").addEventListener("click", showService);
$("key").addEventListener("change", () => ($("service").hidden ? loadModel() : showService()));
// the address that api_server.py shows has the key of its run behind the #, which no browser sends
const shown = /^#key=(sepsis_[\w-]+)$/.exec(location.hash);
if (shown) { $("key").value = shown[1]; history.replaceState(null, "", location.pathname); }
loadModel();
