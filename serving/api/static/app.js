// The page: scores observations, shows each visit's risk with its reasons and charts, and the state of the service.
import { bars, lineChart } from "/static/charts.js";
import { make } from "/static/dom.js";
import { parseObservations, seriesByVisit, visitKey } from "/static/observations.js";

const $ = (id) => document.getElementById(id);
const ORDER = { HIGH: 0, MEDIUM: 1, LOW: 2, UNKNOWN: 3 };
const SIGNS = { HIGH: "▲▲", MEDIUM: "▲", LOW: "●", UNKNOWN: "?" };
const VITALS = [["heart rate", /^(hr|heart.?rate|pulse|8867-4)$/i], ["systolic pressure", /^(sbp|systolic.*|8480-6)$/i],
  ["mean pressure", /^(map|mbp|8478-0)$/i], ["respiratory rate", /^(resp|rr|respir.*|9279-1)$/i],
  ["temperature", /^(temp.*|8310-5)$/i], ["oxygen saturation", /^(spo2|o2sat|59408-5|2708-6)$/i],
  ["lactate", /^(lactate|2524-7|32693-4)$/i], ["white cells", /^(wbc|6690-2)$/i]];
const DETAILS = "explain=6&trajectory=16", MOST = 16; // of each visit
let model = null, scored = [], series = new Map(), given = [];

export const percent = (p) => (p === null ? "no score" : p < 0.001 ? "< 0.1%" : p > 0.999 ? "> 99.9%" : `${(100 * p).toFixed(p < 0.1 || p > 0.99 ? 1 : 0)}%`);

async function ask(path, options = {}) {
  const key = $("key").value.trim();
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 || answer.status === 403) $("key-label").hidden = false;
  return answer;
}

function say(text, kind = "") { $("status").textContent = text; $("status").className = kind; }

const WORDS = { last: "latest", min: "lowest", max: "highest", mean: "mean", std: "spread", count: "number measured", slope: "trend an hour",
  change: "change since first", delta: "change since previous", age: "hours since measured", measured: "ever measured", rate: "values an hour",
  gap: "hours between last two", outside: "distance outside range", share_below: "share below range", share_above: "share above range",
  cv: "relative spread", mean_abs_change: "mean step", departure: "latest against mean", zscore: "latest in standard deviations",
  ewm: "recent mean", departure_ewm: "latest against recent mean", hours_since_max: "hours since highest", hours_since_min: "hours since lowest" };
const SCORES = { sirs: "SIRS", qsofa: "qSOFA", news2: "NEWS2", sofa: "SOFA (partial)" };

// a feature's name for people
function inWords(feature) {
  const [code, name, window] = feature.split("__").length > 3 ? [feature, "", ""] : feature.split("__");
  if (code === "clinical" || code === "context") {
    const [score, ...part] = name.split("_");
    if (SCORES[score]) return `${SCORES[score]}${part.length ? `, ${part.join(" ")}` : ""}`;
    return name.replaceAll("_", " ");
  }
  return `${code}${name ? `: ${WORDS[name] || name.replaceAll("_", " ")}` : ""}${window ? ` in ${window.replace("h", " h")}` : ""}`;
}

// ------------------------------------------------------------------------------------------------- scoring

async function score(text) {
  $("remarks").replaceChildren();
  let observations;
  try { observations = parseObservations(text); } catch (error) { return say(`These observations cannot be read: ${error.message}`, "bad"); }
  say(`Scoring ${observations.length.toLocaleString("en")} observations …`);
  const n = new Set(observations.filter((row) => row).map(visitKey)).size;
  const [answer, body] = await predict(observations, n * MOST <= (model?.limits.visits ?? 2000)); // else when a visit is opened
  if (!answer) return say("The service does not answer.", "bad");
  if (!answer.ok) {
    asideRemarks(body.set_aside);
    return say(body.message, "bad");
  }
  [series, given] = [seriesByVisit(observations), observations];
  scored = body.predictions.sort((a, b) => ORDER[a.risk_level] - ORDER[b.risk_level] || (b.sepsis_probability ?? -1) - (a.sepsis_probability ?? -1));
  for (const text of body.warnings) $("remarks").append(make("li", {}, text));
  asideRemarks(body.set_aside);
  say("");
  $("version").textContent = `model ${body.model_version}`;
  showVisits();
}

// [answer, body], or [null] where none comes
async function predict(observations, details) {
  try {
    const answer = await ask(`/predict${details ? `?${DETAILS}` : ""}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(observations) });
    return [answer, await answer.json()];
  } catch { return [null]; }
}

// reasons and scores over time of one visit of many
async function addDetails(p) {
  if (p.trajectory || p.sepsis_probability === null) return;
  const [answer, body] = await predict(given.filter((row) => row && visitKey(row) === visitKey(p)), true);
  if (answer?.ok) Object.assign(p, { reasons: body.predictions[0].reasons, trajectory: body.predictions[0].trajectory });
}

function asideRemarks(aside) {
  for (const r of aside?.reasons || []) {
    const rows = r.first_rows.length ? ` (rows ${r.first_rows.map((n) => n + 1).join(", ")}${r.count > r.first_rows.length ? ", …" : ""})` : "";
    $("remarks").append(make("li", {}, `${r.count} not used: ${r.meaning}${rows}`));
  }
}

function showVisits() {
  const count = (level) => scored.filter((p) => p.risk_level === level).length;
  $("count").textContent = `${scored.length} ${scored.length === 1 ? "visit" : "visits"}: ${["HIGH", "MEDIUM", "LOW", "UNKNOWN"].map((l) => `${count(l)} ${l}`).join(", ")}`;
  $("visits").replaceChildren(...scored.map((p, i) => make("li", {},
    make("button", { type: "button", class: `visit ${p.risk_level}`, "data-index": i },
      make("span", { class: "badge" }, make("span", { "aria-hidden": "true" }, `${SIGNS[p.risk_level]} `), p.risk_level),
      make("span", { class: "who" }, `visit ${p.visit_id}`, make("small", {}, `${p.client}`)),
      make("span", { class: "p" }, percent(p.sepsis_probability))))));
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
  box.replaceChildren(make("h3", {}, `Visit ${p.visit_id}, ${p.client}`),
    make("p", { class: `headline ${p.risk_level}` },
      make("span", { class: "badge" }, make("span", { "aria-hidden": "true" }, `${SIGNS[p.risk_level]} `), `${p.risk_level} risk`),
      ` ${percent(p.sepsis_probability)}${p.sepsis_probability === null ? ": nothing usable was observed" : ` probability of sepsis${horizon}`}`),
    p.as_of ? make("p", { class: "quiet" }, `as of ${p.as_of.replace("T", " ").replace("Z", " UTC")}`) : null);
  if (p.reasons?.length) {
    box.append(make("h4", {}, "Strongest reasons"), make("ul", { class: "reasons" }, ...p.reasons.map((r) =>
      make("li", { class: r.contribution > 0 ? "up" : "down" }, make("span", { class: "sign" }, r.contribution > 0 ? "raises" : "lowers"),
        make("span", { title: r.feature }, ` ${inWords(r.feature)} `), make("b", {}, r.value === null ? "not measured" : String(Number(r.value.toPrecision(4))))))));
  }
  const codes = series.get(visitKey(p)) || new Map();
  const times = [...codes.values()].flat().map((point) => point[0]);
  const scores = (p.trajectory || []).filter((q) => q.sepsis_probability !== null).map((q) => [Date.parse(q.as_of), q.sepsis_probability]);
  if (times.length) {
    const span = [Math.min(...times), Math.max(...times)];
    const levels = model ? [{ value: model.risk_thresholds.medium, label: "MEDIUM" }, { value: model.risk_thresholds.high, label: "HIGH" }] : [];
    if (scores.length) box.append(make("h4", {}, "Score over time"), lineChart("probability of sepsis", scores, { span, low: 0, high: 1, height: 120, marks: levels, format: percent }));
    const shown = VITALS.map(([name, like]) => [name, [...codes].find(([code]) => like.test(code))]).filter(([, found]) => found);
    if (shown.length) box.append(make("h4", {}, "Vital signs and laboratory"),
      make("div", { class: "charts" }, ...shown.map(([name, [code, points]]) => lineChart(`${name} (${code})`, points, { span }))));
  }
  if (focus) { box.focus({ preventScroll: true }); if (box.getBoundingClientRect().top > innerHeight * 0.6 || box.getBoundingClientRect().top < 0) box.scrollIntoView({ block: "start" }); }
}

$("visits").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) showDetail(Number(button.dataset.index));
});
$("input").addEventListener("submit", (event) => { event.preventDefault(); score($("data").value); });
$("demo").addEventListener("click", async () => {
  const text = await (await fetch("/demo-patients")).text();
  $("data").value = text;
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
  $("requests").replaceChildren(bars(of("sepsis_requests_total").filter((s) => !s.labels.route.startsWith("/static")).map((s) => ({ label: `${s.labels.route} ${s.labels.status}`, value: s.value, kind: s.labels.status >= "400" ? "HIGH" : "" })).sort((a, b) => b.value - a.value).slice(0, 12)));
  $("aside").replaceChildren(bars(of("sepsis_rows_set_aside_total").map((s) => ({ label: s.labels.reason.replaceAll("_", " "), value: s.value }))));
  if (!model) return;
  const interval = (m) => (m ? `${m.value.toFixed(3)} (${m.interval.map((v) => v.toFixed(3)).join(" to ")})` : "–");
  const test = model.metrics.test || {};
  const figure = (name) => (test[name]?.value !== undefined ? interval(test[name]) : typeof test[name] === "number" ? test[name].toFixed(3) : "–");
  const rows = [["version", model.model_version], ["features", `${model.n_features}, set ${model.feature_set}`], ["model", model.model],
    ["looks ahead", model.retrospective ? "no: scores whole stays" : `${model.horizon_hours} h`], ["trained", model.trained_at], ["on", model.trained_on],
    ["risk levels", `MEDIUM from ${model.risk_thresholds.medium}, HIGH from ${model.risk_thresholds.high}`],
    ["ROC AUC, test part", figure("roc_auc")], ["average precision", figure("average_precision")]];
  $("card").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value ?? "–"))]));
}

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
loadModel();
