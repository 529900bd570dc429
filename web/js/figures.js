// @ts-check
// Plotly's traces and layouts of a run's history, and the same as tables. No DOM, no ComfyUI, no Plotly.

import { layer, recall, select, smooth } from "./series.js";

/** @typedef {import("./series.js").History} History */
/** @typedef {import("./series.js").Values} Values */
/** @typedef {import("./series.js").Column} Column */
/** @typedef {{data: any[], layout: any, columns: Column[]}} Figure without a column there is nothing to see yet */
/**
 * @typedef {{t: import("./strings.js").Translate, language: string, smoothing: number, log: boolean, tower: string,
 *            role: string, colours: {text: string, grid: string, back: string}}} Look
 */

export const KINDS = ["loss", "heat", "gradients", "drift", "rate", "speed"];
const LOG_AXIS = ["loss", "rate"]; // whose axis the switch is for; gradients and drift are always logarithmic
const FILTERED = ["heat", "gradients", "drift"];

/** Okabe and Ito's colours, which people with any colour vision tell apart; those that show on light and dark first. */
const COLOURS = ["#0E86C8", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"];
/** Cividis, from the first layer to the last; neither end is lost on a light or a dark page. */
const DEPTH = ["#34548a", "#5a6a80", "#7b7f7c", "#9a9376", "#bda96b", "#dcbf55"];
const DASHES = ["solid", "dot", "dash", "longdash", "dashdot", "longdashdot"];
const MOST_IN_LEGEND = 10;
const ROUNDING = 1e-7; // of fp32: a layer that differs from itself by less has not moved

/** @param {string} kind */
export const hasLogSwitch = (kind) => LOG_AXIS.includes(kind);
/** The role that is shown first: lines of all of them at once tell nothing. @param {string} kind */
export const firstRole = (kind) => (kind === "gradients" || kind === "drift" ? "theta" : "");
/** @param {string} kind */
export const hasFilter = (kind) => FILTERED.includes(kind);

/**
 * @param {string} kind one of `KINDS`
 * @param {History} history
 * @param {Look} look
 * @returns {Figure}
 */
export function figure(kind, history, look) {
  const made = { loss, heat, gradients, drift, rate, speed }[kind](history, look);
  const base = frame(look);
  const layout = {
    ...base,
    ...made.layout,
    uirevision: `${history.run} ${kind} ${look.log} ${look.tower} ${look.role}`,
  };
  layout.xaxis = { ...base.xaxis, ...made.layout.xaxis };
  return { data: made.data, layout, columns: made.columns };
}

/** @param {Look} look */
function frame({ t, language, colours }) {
  const parts = new Intl.NumberFormat(language).formatToParts(12345.6);
  const sign = (type, other) => parts.find((part) => part.type === type)?.value ?? other;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colours.text, size: 11, family: "Inter, system-ui, sans-serif" },
    separators: sign("decimal", ".") + sign("group", ","),
    margin: { l: 52, r: 14, t: 6, b: 34 },
    xaxis: {
      title: { text: t("chart.step"), standoff: 4 },
      ticklabelstandoff: 5, // off the lowest number of an axis at the right
      gridcolor: colours.grid,
      zeroline: false,
      automargin: true,
    },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", font: { size: 10 } },
    hoverlabel: { bgcolor: colours.back, bordercolor: colours.grid, font: { color: colours.text, size: 11 } },
    hovermode: "x unified",
    dragmode: "zoom",
  };
}

/** @param {Look} look @param {string} title */
function axis({ colours }, title, log = false) {
  const form = log ? { type: "log", exponentformat: "power", dtick: undefined } : { exponentformat: "e" };
  return { title: { text: title, standoff: 4 }, gridcolor: colours.grid, zeroline: false, automargin: true, ...form };
}

/** @param {string} name @param {number[]} x @param {Values} y @param {string} colour */
function line(name, x, y, colour, more = {}) {
  return {
    type: "scatter",
    mode: "lines",
    name,
    x,
    y,
    line: { color: colour, width: 1.5 },
    hovertemplate: "%{y:.4g}",
    ...more,
  };
}

/** @param {History} history @param {string} name @param {"mean" | "min" | "max"} part @returns {Values} */
function values(history, name, part = "mean") {
  const series = history.series[name];
  return series?.[part] ?? series?.mean ?? [];
}

/** @param {History} history @param {Look} look @returns {Figure} */
function loss(history, look) {
  const { t } = look;
  const { at } = history;
  const raw = values(history, "loss");
  const smoothed = smooth(at, raw, look.smoothing, history.stride);
  const columns = raw.length ? [{ head: t("chart.loss"), at, values: raw }] : [];
  const data = [];
  if (history.series.loss?.min) {
    const [low, high] = [values(history, "loss", "min"), values(history, "loss", "max")];
    const band = { line: { width: 0 }, showlegend: false, hoverinfo: "skip", hovertemplate: undefined };
    data.push(line("", at, low, COLOURS[0], band));
    data.push(line("", at, high, COLOURS[0], { ...band, fill: "tonexty", fillcolor: "rgba(14,134,200,0.2)" }));
    columns.push({ head: t("chart.lowest"), at, values: low }, { head: t("chart.highest"), at, values: high });
  }
  if (raw.length) {
    const faint = look.smoothing > 0 ? { opacity: 0.6, line: { color: COLOURS[0], width: 1 } } : {};
    data.push(line(t("chart.loss"), at, raw, COLOURS[0], faint));
    if (look.smoothing > 0) {
      data.push(line(t("chart.smoothed"), at, smoothed, COLOURS[0], { line: { color: COLOURS[0], width: 2 } }));
      columns.push({ head: t("chart.smoothed"), at, values: smoothed });
    }
    for (const name of Object.keys(history.series).filter((name) => name.startsWith("losses."))) {
      columns.push({ head: name.slice("losses.".length), at, values: values(history, name) });
    }
  }
  const measured = history.measures.map((one) => one.step);
  const points = (name, all, colour, symbol, more) => {
    if (!all.some((one) => one !== null)) return;
    const marker = { color: colour, size: 6, symbol };
    data.push(line(name, measured, all, colour, { mode: "lines+markers", marker, connectgaps: true, ...more }));
    columns.push({ head: name, at: measured, values: all });
  };
  points(
    t("chart.held_out"),
    history.measures.map((one) => one.loss ?? null),
    COLOURS[1],
    "circle",
    {},
  );
  const right = { yaxis: "y2", hovertemplate: "%{y:.1%}" };
  points(t("chart.recall"), history.measures.map(recall), COLOURS[2], "diamond", right);
  const yaxis2 = {
    ...axis(look, ""),
    overlaying: "y",
    side: "right",
    showgrid: false,
    tickformat: ".0%",
    rangemode: "tozero",
    tickmode: "auto",
    nticks: 5,
  };
  const margin = { l: 36, r: 36, t: 6, b: 34 };
  return { data, columns, layout: { yaxis: axis(look, "", look.log), yaxis2, margin } };
}

/** Gradient norms, layers × time. @param {History} history @param {Look} look @returns {Figure} */
function heat(history, look) {
  const { t } = look;
  const { at, names, grad_norm } = history.layers;
  const shown = select(names, look.tower, look.role);
  const rows = shown.map((name) => grad_norm[names.indexOf(name)]);
  const z = rows.map((row) => row.map((value) => (value !== null && value > 0 ? Math.log10(value) : null)));
  const all = z.flat().filter((value) => value !== null);
  const [low, high] = all.reduce(
    ([low, high], one) => [Math.min(low, one), Math.max(high, one)],
    [Infinity, -Infinity],
  );
  const every = Math.max(1, Math.ceil((high - low) / 5));
  const ticks = all.length ? decades(Math.floor(low), Math.ceil(high), every) : [];
  const trace = {
    type: "heatmap",
    x: at,
    y: shown,
    z,
    customdata: rows,
    colorscale: "Cividis",
    hoverongaps: false,
    hovertemplate: `%{y}<br>${t("chart.step")} %{x}<br>%{customdata:.3g}<extra></extra>`,
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      tickvals: ticks,
      ticktext: ticks.map((power) => `1e${power}`),
      title: { text: t("chart.norm"), side: "right" },
    },
  };
  const columns = shown.map((name, i) => ({ head: name, at, values: rows[i] }));
  const yaxis = { type: "category", automargin: true, tickfont: { size: 9 }, showgrid: false };
  const margin = { l: 20, r: 14, t: 6, b: 34 };
  return {
    data: all.length ? [trace] : [],
    columns: all.length ? columns : [],
    layout: { yaxis, margin, hovermode: "closest" },
  };
}

/** @param {number} low @param {number} high @param {number} every */
function decades(low, high, every) {
  const powers = [];
  for (let power = low; power <= high; power += every) powers.push(power);
  return powers;
}

/** @param {History} history @param {Look} look @returns {Figure} */
function gradients(history, look) {
  const { at, names, grad_norm } = history.layers;
  const columns = select(names, look.tower, look.role).map((name) => ({
    head: name,
    at,
    values: grad_norm[names.indexOf(name)],
  }));
  return layerLines(columns, look, look.t("chart.norm"), 0);
}

/** How far each layer has moved since the run's start. @param {History} history @param {Look} look @returns {Figure} */
function drift(history, look) {
  const measures = history.measures.filter((one) => Object.keys(one.moved ?? {}).length);
  const names = new Set(measures.flatMap((one) => Object.keys(one.moved ?? {})));
  const at = measures.map((one) => one.step);
  const columns = select([...names], look.tower, look.role).map((name) => ({
    head: name,
    at,
    values: measures.map((one) => one.moved?.[name] ?? null),
  }));
  return layerLines(columns, look, look.t("chart.moved"), ROUNDING);
}

/**
 * A line per layer: colour tells the depth, dashes tell the role.
 *
 * @param {Column[]} columns @param {Look} look @param {string} title
 * @param {number} least what is not above is left out: the axis is logarithmic
 * @returns {Figure}
 */
function layerLines(columns, look, title, least) {
  const roles = [...new Set(columns.map(({ head }) => layer(head).role))];
  const data = columns.map(({ head, at, values }, place) => {
    const colour = DEPTH[Math.floor((place / columns.length) * DEPTH.length)];
    const shown = values.map((value) => (value !== null && value > least ? value : null));
    const dash = DASHES[roles.indexOf(layer(head).role) % DASHES.length];
    const mode = at.length < 2 ? "markers" : "lines";
    return line(head, at, shown, colour, {
      mode,
      line: { color: colour, width: 1.2, dash },
      hovertemplate: `${head}: %{y:.3g}<br>${look.t("chart.step")} %{x}<extra></extra>`,
    });
  });
  const showlegend = columns.length <= MOST_IN_LEGEND;
  return { data, columns, layout: { yaxis: axis(look, title, true), showlegend, hovermode: "closest" } };
}

/** Learning rates. @param {History} history @param {Look} look @returns {Figure} */
function rate(history, look) {
  const groups = Object.keys(history.series).filter((name) => name.startsWith("lrs."));
  const names = groups.length > 1 ? groups : ["lr"];
  const label = (name) => (name === "lr" ? look.t("chart.rate") : `× ${name.slice("lrs.".length)}`);
  const made = several(history, names, label);
  return { ...made, layout: { yaxis: axis(look, look.t("chart.rate"), look.log), showlegend: names.length > 1 } };
}

/** Pairs a second, and memory. @param {History} history @param {Look} look @returns {Figure} */
function speed(history, look) {
  const { t } = look;
  const made = several(history, ["pairs_per_second", "memory"], (name) => t(`chart.${name}`));
  const memory = made.data.find((one) => one.name === t("chart.memory"));
  if (memory) Object.assign(memory, { yaxis: "y2", y: memory.y.map((one) => (one === null ? null : one / 1e9)) });
  const yaxis2 = {
    ...axis(look, "GB"),
    overlaying: "y",
    side: "right",
    showgrid: false,
    rangemode: "tozero",
    tickmode: "auto",
    nticks: 5,
  };
  const yaxis = { ...axis(look, t("chart.pairs_per_second")), rangemode: "tozero" };
  return { ...made, layout: { yaxis, yaxis2, margin: { l: 52, r: 52, t: 6, b: 34 } } };
}

/** @param {History} history @param {string[]} names of series @param {(name: string) => string} label */
function several(history, names, label) {
  const { at } = history;
  const there = names.filter((name) => values(history, name).some((value) => value !== null));
  const columns = there.map((name) => ({ head: label(name), at, values: values(history, name) }));
  const data = columns.map(({ head, values }, i) =>
    line(head, at, values, COLOURS[i % COLOURS.length], {
      line: { color: COLOURS[i % COLOURS.length], width: 1.5, dash: DASHES[i % DASHES.length] },
    }),
  );
  return { data, columns };
}
