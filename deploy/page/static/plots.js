// What each plot shows: its traces from the run's samples, its axes with units, and one sentence that says the same.

export const number = (x, digits = 0) =>
  x == null || !isFinite(x) ? "–" : x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const percent = (x) => (x == null ? "–" : number(100 * x, 1) + " %");
export const rate = (x) => number(x, x != null && Math.abs(x) < 10 ? 1 : 0);
export const sequence = (version) => {
  const n = Number(String(version ?? "").split(".").pop());
  return version == null || version === "" || !isFinite(n) ? null : n;
};
const score = (x) => number(x, 3);
const ms = (x) => (x == null ? "–" : number(x) + " ms");

const at = (samples, get) => samples.map((s) => get(s) ?? null);
const TASKS = [["click", "learned", "solid"], ["watch", "second", "dash"], ["purchase", "third", "dot"]];

function tasks(samples, measure) {
  const last = samples.at(-1)?.prequential ?? {};
  const known = TASKS.filter(([name]) => name in last);
  const others = Object.keys(last).filter((name) => !TASKS.some((t) => t[0] === name));
  return [...known, ...others.map((name) => [name, "neutral", "dashdot"])].map(([name, colour, dash]) => ({
    name, colour, dash, y: at(samples, (s) => s.prequential?.[name]?.[measure]), show: score,
  }));
}

function publishedPerSecond(samples) {
  // Over the last five seconds or so: versions come a few times a second, so one second alone is a comb.
  return samples.map((s, i) => {
    let j = i;
    while (j > 0 && s.t - samples[j].t < 5) j--;
    const time = s.t - samples[j].t;
    return time > 0 && s.versions_published != null && samples[j].versions_published != null
      ? (s.versions_published - samples[j].versions_published) / time : null;
  });
}

const STAGES = [["joined", "neutral", "dashdot"], ["trained", "second", "dash"], ["committed", "third", "dot"], ["servable", "learned", "solid"]];

// name → samples → {series: [{name, colour, dash, y, show, axis?}], unit, lower?: {unit}, level?: y of a reference line}
export const PLOTS = {
  ctr: (samples) => ({
    unit: "click-through rate, %", percent: true, lower: { unit: "learned ÷ frozen, ×", share: 0.3, level: 1 },
    series: [
      { name: "learned", colour: "learned", dash: "solid", width: 2.6, y: at(samples, (s) => s.ctr), show: percent },
      { name: "frozen", colour: "neutral", dash: "dash", y: at(samples, (s) => s.ctr_frozen), show: percent },
      { name: "ratio", colour: "third", dash: "solid", lower: true, show: (x) => number(x, 2) + " ×",
        y: at(samples, (s) => (s.ctr != null && s.ctr_frozen > 0 ? s.ctr / s.ctr_frozen : null)) },
    ],
  }),
  freshness: (samples) => ({
    unit: "ms", zero: true,
    series: [["p99", "second", "solid"], ["p95", "learned", "dash"], ["p50", "third", "dot"]].map(([name, colour, dash]) => ({
      name, colour, dash, y: at(samples, (s) => s.freshness_ms?.[name]), show: ms,
    })),
  }),
  stages: (samples) => ({
    unit: "ms since it was sent, median", zero: true,
    series: STAGES.map(([name, colour, dash]) => ({ name, colour, dash, y: at(samples, (s) => s.freshness_ms?.stages?.[name]), show: ms })),
  }),
  throughput: (samples) => ({
    unit: "per second", zero: true,
    series: [
      { name: "events", colour: "neutral", dash: "dash", y: at(samples, (s) => s.events_per_s), show: (x) => rate(x) + " /s" },
      { name: "trained examples", colour: "learned", dash: "solid", y: at(samples, (s) => s.trained_per_s), show: (x) => rate(x) + " /s" },
    ],
  }),
  auc: (samples) => ({ unit: "AUC (0 to 1)", ticks: ".2f", level: 0.5, series: tasks(samples, "auc") }),
  ne: (samples) => ({ unit: "normalised entropy (ratio)", ticks: ".2f", level: 1, series: tasks(samples, "ne") }),
  versions: (samples) => ({
    unit: "version number", lower: { unit: "published per second", share: 0.34, zero: true },
    series: [
      { name: "trainer", colour: "learned", dash: "solid", y: at(samples, (s) => sequence(s.trainer_version)), last: true, show: (x) => number(x) },
      { name: "replica", colour: "second", dash: "dot", y: at(samples, (s) => sequence(s.replica_version)), last: true, show: (x) => number(x) },
      { name: "published", colour: "neutral", dash: "solid", lower: true, y: publishedPerSecond(samples), show: (x) => rate(x) + " /s" },
    ],
  }),
};

export function timeUnit(seconds) {
  if (seconds < 240) return { by: 1, name: "seconds since start" };
  if (seconds < 4 * 3600) return { by: 60, name: "minutes since start" };
  return { by: 3600, name: "hours since start" };
}

const MAX_POINTS = 300; // in a line; of longer runs a point is the mean of several samples

function thinned(values, size, last) {
  if (size === 1) return values;
  const out = [];
  for (let i = 0; i < values.length; i += size) {
    const there = values.slice(i, i + size).filter((v) => v != null);
    out.push(!there.length ? null : last ? there.at(-1) : there.reduce((a, b) => a + b, 0) / there.length);
  }
  return out;
}

// Newest value of a series that is not missing.
export const newest = (series) => series.y.findLast((v) => v != null) ?? null;

export function sentence(title, plot, seconds) {
  const said = plot.series.filter((s) => newest(s) != null).map((s) => `${s.name} ${s.show(newest(s))}`);
  return said.length ? `${title} after ${number(seconds)} s: ${said.join(", ")}. Plotted over time, ${plot.unit}.` : `${title}: no data yet.`;
}

// Plotly's data and layout of a plot; `box` {width, height} in pixels.
export function figure(plot, samples, theme, box) {
  const size = Math.ceil(samples.length / MAX_POINTS);
  const unit = timeUnit(samples.at(-1).t);
  const x = thinned(samples.map((s) => s.t / unit.by), size, true);
  const font = { family: theme.font, size: 12, color: theme.soft };
  const data = plot.series.map((s) => {
    const y = thinned(s.y, size, s.last);
    return {
      type: "scatter", mode: x.length > 1 ? "lines" : "markers", name: s.name, x,
      y: plot.percent && !s.lower ? y.map((v) => (v == null ? null : 100 * v)) : y, yaxis: s.lower ? "y2" : "y",
      line: { color: theme[s.colour], width: s.width ?? 2, dash: s.dash }, connectgaps: true,
      hovertemplate: `%{customdata}<extra>${s.name}</extra>`, customdata: y.map((v) => s.show(v)),
    };
  });
  const margin = { l: 44, r: 10, t: 22, b: 38, pad: 4 };
  const split = plot.lower ? plot.lower.share + 30 / (box.height - margin.t - margin.b) : 0; // room for the lower unit
  const axis = { gridcolor: theme.grid, zeroline: false, tickfont: font, fixedrange: true, nticks: 6, automargin: true, separatethousands: true, tickformat: plot.ticks ?? "" };
  const time = size > 1 ? `${unit.name}, mean of ${size} samples a point` : unit.name;
  const label = (text, y) => ({ text, xref: "paper", yref: "paper", x: 0, y, xanchor: "left", yanchor: "bottom", showarrow: false, font, yshift: 3 });
  const level = (y, yref) => ({ type: "line", xref: "paper", x0: 0, x1: 1, yref, y0: y, y1: y, line: { color: theme.neutral, width: 1 }, layer: "below" });
  const layout = {
    font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "x unified",
    hoverlabel: { bgcolor: theme.card, bordercolor: theme.line, font: { ...font, color: theme.ink } },
    margin, width: box.width, height: box.height, // else it stays as large as it was first drawn
    xaxis: { ...axis, automargin: false, tickformat: "", showgrid: false, title: { text: time, standoff: 6, font }, range: [0, Math.max(x.at(-1), 10 / unit.by)],
             nticks: box.width < 420 ? 5 : 8, anchor: plot.lower ? "y2" : "y", showline: true, linecolor: theme.line },
    yaxis: { ...axis, domain: [split, 1], rangemode: plot.zero ? "tozero" : "normal" },
    annotations: [label(plot.unit, 1)],
    shapes: [],
  };
  if (plot.level != null) layout.shapes.push(level(plot.level, "y"));
  if (plot.lower) {
    layout.yaxis2 = { ...axis, tickformat: "", domain: [0, plot.lower.share], nticks: 3, rangemode: plot.lower.zero ? "tozero" : "normal" };
    layout.annotations.push(label(plot.lower.unit, plot.lower.share));
    if (plot.lower.level != null) layout.shapes.push(level(plot.lower.level, "y2"));
  }
  return { data, layout };
}
