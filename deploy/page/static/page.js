// The run's samples come as server-sent events; tiles, tables and plots are drawn from all of them, once a second at most.
import { PLOTS, figure, newest, number, percent, rate, sentence, sequence } from "/static/plots.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const byId = (id) => document.getElementById(id);
let samples = [];
let ended = false;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["card", "line", "grid", "ink", "soft", "learned", "second", "third", "neutral", "font"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()]));
}

function clock(seconds) {
  const s = Math.floor(seconds), pad = (n) => String(n).padStart(2, "0");
  return (s >= 3600 ? Math.floor(s / 3600) + ":" + pad(Math.floor(s / 60) % 60) : Math.floor(s / 60)) + ":" + pad(s % 60);
}

function status(state, text) {
  byId("status").dataset.state = state;
  byId("state").textContent = text;
}

// [label, figure, unit, line under it, class]; without those of which nothing can be known here.
function tiles(s) {
  const ratio = s.ctr != null && s.ctr_frozen > 0 ? s.ctr / s.ctr_frozen : null;
  const behind = sequence(s.trainer_version) - sequence(s.replica_version);
  const fresh = s.freshness_ms ?? {};
  const balance = [s.lost, s.duplicated];
  const counted = balance.every((n) => n != null);
  const trainer = s.trainer_version != null;
  const late = s.replica_version ? `replica ${s.replica_version}${behind > 0 ? `, ${number(behind)} behind` : ""}` : "no replica is ready yet";
  return [
    "ctr" in s && ["CTR, learned ÷ frozen", number(ratio, 2), ratio == null ? "" : "×", `${percent(s.ctr)} against ${percent(s.ctr_frozen)}`, "lead"],
    "freshness_ms" in s && ["Freshness, p99", number(fresh.p99), fresh.p99 == null ? "" : "ms", fresh.p50 == null ? "no probe has come back yet" : `p50 ${number(fresh.p50)} ms`, ""],
    ["Events in", number(s.events_in), "", `${rate(s.events_per_s)} per second`, ""],
    ["Trained examples", number(s.trained_examples), "", `${rate(s.trained_per_s)} per second`, ""],
    (counted || s.recount) && ["Lost · duplicated", `${number(balance[0])} · ${number(balance[1])}`, "", counted ? "recounted from the log" : `recounted ${s.recount}`, counted && balance.some((n) => n > 0) ? "bad" : ""],
    [trainer ? "Version, trainer" : "Version", (trainer ? s.trainer_version : s.replica_version) || "–", "", trainer ? late : "of the replica", ""],
  ].filter(Boolean);
}

function drawTiles(s) {
  byId("tiles").replaceChildren(...tiles(s).map(([label, value, unit, under, kind]) =>
    make("div", { class: "tile " + kind }, make("dt", {}, label),
      make("dd", { class: "figure", title: value }, value, ...(unit ? [make("small", {}, unit)] : [])), make("dd", { class: "under" }, under))));
}

function pairs(id, values, digits = 0) {
  const rows = Object.entries(values).filter(([, v]) => v != null);
  byId(id).replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, number(value, digits))]));
  byId(id).parentElement.hidden = !rows.length;
}

function state(name) {
  const up = name === "up" ? "up" : "down";
  return make("span", { class: "status", "data-state": up }, make("span", { class: "dot", "aria-hidden": "true" }), name ?? "unknown");
}

// Columns of a table: key → [heading, how a value is shown]. A column that no row has is left out, so is an empty table.
const PROCESSES = {
  name: ["process", String], state: ["state", state], pid: ["pid", String], restarts: ["restarts", number],
  cores: ["cores", (x) => number(x, 2)], memory_mb: ["MB", number], lag: ["records behind", number],
};
const OFFSETS = { partition: ["partition", String], end: ["end", number], behind: ["not served yet", number] };

function table(id, columns, rows) {
  const keys = Object.keys(columns).filter((key) => rows.some((row) => row[key] != null));
  const align = (key) => (typeof rows[0]?.[key] === "string" ? {} : { class: "n" });
  const head = keys.map((key) => make("th", { scope: "col", ...align(key) }, columns[key][0]));
  const body = rows.map((row) => make("tr", {}, ...keys.map((key) => make("td", align(key), row[key] == null ? "–" : columns[key][1](row[key])))));
  byId(id).replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  byId(id).parentElement.hidden = !rows.length;
}

let problems = "";
function drawProblems(now) {
  if (now.join("\n") === problems) return; // a screen reader reads what is put in
  problems = now.join("\n");
  byId("problems").replaceChildren(...now.map((text) => make("li", {}, text)));
}

function drawTables(s) {
  table("processes", PROCESSES, s.processes ?? []);
  table("offsets", OFFSETS, s.offsets ?? []);
  pairs("counts", { "examples joined": s.examples, "open, waiting for a click": s.open, "late": s.late, "duplicates set aside": s.duplicates, "rejected": s.rejected, "freshness probes answered": s.freshness_ms?.count });
  pairs("rows", s.rows ?? {});
  pairs("calibration", Object.fromEntries(Object.entries(s.prequential ?? {}).map(([task, m]) => [task, m.calibration])), 3);
}

function drawLegend(list, plot, colours) {
  const dashes = { dash: "6 3", dot: "2 3", dashdot: "6 3 2 3" };
  list.replaceChildren(...plot.series.map((s) => {
    const item = make("li");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    line.setAttribute("viewBox", "0 0 22 8"); line.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(line.namespaceURI, "path");
    for (const [name, value] of Object.entries({ d: "M0 4H22", stroke: colours[s.colour], "stroke-width": 2.4, "stroke-dasharray": dashes[s.dash] ?? "none" })) path.setAttribute(name, value);
    line.append(path);
    item.append(line, s.name + " ", make("b", {}, s.show(newest(s))));
    return item;
  }));
}

function drawPlots() {
  const colours = theme();
  const cards = [...document.querySelectorAll("[data-plot]")].map((card) => [card, PLOTS[card.dataset.plot](samples)]);
  for (const [card, plot] of cards) card.hidden = "optional" in card.dataset && plot.series.every((s) => newest(s) == null);
  for (const [card, plot] of cards) {  // only now: which are there decides how wide each is
    if (card.hidden) continue;
    const target = card.querySelector(".plot");
    drawLegend(card.querySelector(".legend"), plot, colours);
    target.setAttribute("aria-label", sentence(card.querySelector("h2").textContent, plot, samples.at(-1).t));
    const { data, layout } = figure(plot, samples, colours, { width: target.clientWidth, height: target.clientHeight });
    Plotly.react(target, data, layout, { displayModeBar: false });
  }
}

let waiting = false;
let rested = 0; // when plots may be drawn again: they take a tenth of the time at most, the rest is the reader's
function draw() {
  if (waiting || document.hidden || !samples.length) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const s = samples.at(-1);
    if (!ended) status(s.problems?.length ? "lost" : "live", s.problems?.length ? "not all is well" : "live");
    byId("clock").textContent = clock(s.t);
    byId("note").textContent = s.note ?? "";
    drawProblems(s.problems ?? []);
    drawTiles(s);
    drawTables(s);
    const began = performance.now();
    if (began < rested && !ended) return;
    drawPlots();
    rested = performance.now() + 9 * (performance.now() - began);
  });
}

function listen() {
  const feed = new EventSource("/samples");
  feed.addEventListener("all", (event) => { samples = JSON.parse(event.data); draw(); });
  feed.addEventListener("message", (event) => { samples.push(...JSON.parse(event.data)); draw(); });
  feed.addEventListener("end", () => { ended = true; feed.close(); status("ended", "run ended"); draw(); });
  feed.addEventListener("error", () => { if (!ended) status("lost", "connection lost, trying again"); });
}

drawTiles({ trainer_version: "" });
const drawAll = () => { rested = 0; draw(); };
dark.addEventListener("change", drawAll);
document.addEventListener("visibilitychange", drawAll);
addEventListener("resize", drawAll);
listen();
