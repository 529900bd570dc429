// @ts-check
// What a run has recorded, as answers of `GET /gmp/runs/{id}/history` (docs/telemetry.md). No DOM, no ComfyUI.

/** @typedef {(number | null)[]} Values */
/** @typedef {{mean: Values, min?: Values, max?: Values}} Series min and max are left out where they are the mean */
/** @typedef {{at: number[], names: string[], grad_norm: Values[], update_ratio: Values[]}} Layers */
/** @typedef {{head: string, at: number[], values: Values}} Column one of a table, by step */
/** @typedef {{step: number, loss?: number | null, moved?: Record<string, number | null>, [name: string]: any}} Measure */
/** @typedef {{alarm: string, step: number, raised: boolean, advice?: string, t?: number}} Alarm */
/** @typedef {{type: string, step?: number, t?: number}} Mark */
/**
 * @typedef {{run: string, step: number, steps?: number | null, stride: number, since: number, reset: boolean,
 *            at: number[], series: Record<string, Series>, layers: Layers, measures: Measure[], alarms: Alarm[],
 *            marks: Mark[]}} History
 */

/** Points that are kept before the whole is asked for again, condensed by the server. */
export const MOST_POINTS = 3000;

/**
 * Puts an answer to `?since=` behind what is there; `reset` replaces it. Neither argument is changed.
 *
 * @param {History | undefined} old
 * @param {History} answer
 * @returns {History} `old` itself where the answer brings nothing
 */
export function merge(old, answer) {
  if (!old || answer.reset) return answer;
  const fresh = answer.at.findIndex((step) => step > (old.at.at(-1) ?? 0));
  const skip = fresh < 0 ? answer.at.length : fresh;
  const at = answer.at.slice(skip);
  const measures = joined(old.measures, answer.measures, (one) => `${one.step}`);
  const alarms = joined(old.alarms, answer.alarms, (one) => `${one.alarm} ${one.step} ${one.raised}`);
  const marks = joined(old.marks, answer.marks, (one) => `${one.type} ${one.step} ${one.t}`);
  const layers = joinedLayers(old.layers, answer.layers);
  const same = old.measures === measures && old.alarms === alarms && old.marks === marks && old.layers === layers;
  if (!at.length && same && old.step === answer.step) return old;
  const names = new Set([...Object.keys(old.series), ...Object.keys(answer.series)]);
  /** @type {Record<string, Series>} */
  const series = {};
  for (const name of names) {
    series[name] = joinedSeries(old.series[name], old.at.length, answer.series[name], at.length, skip);
  }
  const { step, steps } = answer;
  return { ...old, step, steps, at: [...old.at, ...at], series, layers, measures, alarms, marks };
}

/**
 * Both lists in order, each entry once: what belongs to the step that was asked for comes again.
 *
 * @template T
 * @param {T[]} old @param {T[]} more @param {(one: T) => string} key
 * @returns {T[]}
 */
function joined(old, more, key) {
  const known = new Set(old.map(key));
  const fresh = more.filter((one) => !known.has(key(one)));
  return fresh.length ? [...old, ...fresh] : old;
}

/**
 * @param {Series | undefined} old @param {number} before points in front
 * @param {Series | undefined} more @param {number} behind points that are put behind @param {number} skip of `more`
 * @returns {Series}
 */
function joinedSeries(old, before, more, behind, skip) {
  const first = old ?? { mean: nothing(before) };
  const last = more ?? { mean: nothing(skip + behind) };
  /** @param {"mean" | "min" | "max"} part */
  const part = (part) => [...(first[part] ?? first.mean), ...(last[part] ?? last.mean).slice(skip)];
  if (!first.min && !last.min) return { mean: part("mean") };
  return { mean: part("mean"), min: part("min"), max: part("max") };
}

/** @param {Layers} old @param {Layers} more @returns {Layers} */
function joinedLayers(old, more) {
  const skip = more.at.filter((step) => step <= (old.at.at(-1) ?? 0)).length;
  const behind = more.at.length - skip;
  if (!behind) return old;
  const names = [...old.names, ...more.names.filter((name) => !old.names.includes(name))];
  /** @param {"grad_norm" | "update_ratio"} part */
  const rows = (part) =>
    names.map((name) => [
      ...(old[part][old.names.indexOf(name)] ?? nothing(old.at.length)),
      ...(more[part][more.names.indexOf(name)] ?? nothing(skip + behind)).slice(skip),
    ]);
  return {
    at: [...old.at, ...more.at.slice(skip)],
    names,
    grad_norm: rows("grad_norm"),
    update_ratio: rows("update_ratio"),
  };
}

/** @param {number} length @returns {Values} */
function nothing(length) {
  return new Array(length).fill(null);
}

/**
 * Exponential moving average over both directions, so that nothing is shifted to the right:
 * s_i = Σ_j w_j a^(|at_i − at_j| / stride) x_j / Σ_j w_j a^(|at_i − at_j| / stride), w_j the steps behind point j.
 *
 * @param {number[]} at @param {Values} values null: not known
 * @param {number} amount a, 0 (nothing) to below 1
 * @param {number} stride steps of one full point
 * @returns {Values} null where the value is
 */
export function smooth(at, values, amount, stride = 1) {
  if (!(amount > 0)) return values;
  const sums = new Array(values.length).fill(0);
  const weights = new Array(values.length).fill(0);
  /** @param {number[]} order @param {boolean} own whether a point's own value counts, which is in one pass only */
  const pass = (order, own) => {
    let [sum, weight, last] = [0, 0, 0];
    for (const i of order) {
      const fade = amount ** (Math.abs(at[i] - last) / stride);
      [sum, weight, last] = [sum * fade, weight * fade, at[i]];
      const value = values[i];
      const steps = value === null ? 0 : Math.max(1, at[i] - (at[i - 1] ?? 0));
      if (!own) [sums[i], weights[i]] = [sums[i] + sum, weights[i] + weight];
      [sum, weight] = [sum + steps * (value ?? 0), weight + steps];
      if (own) [sums[i], weights[i]] = [sums[i] + sum, weights[i] + weight];
    }
  };
  const order = values.map((_, i) => i);
  pass(order, true);
  pass(order.reverse(), false);
  return values.map((value, i) => (value === null ? null : sums[i] / weights[i]));
}

/**
 * @param {string} name such as `text.3.theta`, `vision.projection`, `logit_scale`
 * @returns {{tower: string, block: number | null, role: string}} tower is empty for what belongs to none
 */
export function layer(name) {
  const parts = name.split(".");
  const role = parts.at(-1) ?? name;
  const tower = parts.length > 1 ? parts[0] : "";
  return { tower, block: parts.length > 2 ? Number(parts[1]) : null, role };
}

/**
 * The layers of a tower and role, from the embedding through the blocks to the projection.
 *
 * @param {string[]} names @param {string} tower empty: all @param {string} role empty: all
 * @returns {string[]}
 */
export function select(names, tower, role) {
  const towers = [...parts(names, "tower").sort(), ""]; // what belongs to no tower comes last
  const place = ({ block, role }) => block ?? (role === "embedding" ? -1 : Number.MAX_SAFE_INTEGER);
  return names
    .map((name) => ({ name, ...layer(name) }))
    .filter((one) => (!tower || one.tower === tower) && (!role || one.role === role))
    .sort((one, other) => towers.indexOf(one.tower) - towers.indexOf(other.tower) || place(one) - place(other))
    .map((one) => one.name);
}

/** The towers or roles that there are, each once. @param {string[]} names @param {"tower" | "role"} part */
export function parts(names, part) {
  return [...new Set(names.map((name) => layer(name)[part]))].filter(Boolean);
}

/** @param {Measure} measure @returns {number | null} mean of the two recall@1 */
export function recall(measure) {
  const both = [measure.recall_at_1_text_to_image, measure.recall_at_1_image_to_text].filter(Number.isFinite);
  return both.length ? both.reduce((sum, one) => sum + one, 0) / both.length : null;
}

/**
 * Columns side by side, a row per step.
 *
 * @param {Column[]} columns @param {string} step heading of the first column
 * @returns {(string | number | null)[][]} the headings first
 */
export function rows(columns, step) {
  /** @type {Map<number, (number | null)[]>} */
  const lines = new Map();
  columns.forEach(({ at, values }, place) => {
    at.forEach((one, i) => {
      if (!lines.has(one)) lines.set(one, new Array(columns.length).fill(null));
      const cells = lines.get(one);
      if (cells) cells[place] = values[i];
    });
  });
  const sorted = [...lines].sort(([one], [other]) => one - other);
  return [[step, ...columns.map(({ head }) => head)], ...sorted.map(([at, cells]) => [at, ...cells])];
}

/**
 * Rows as CSV of RFC 4180; a value that would be a formula in a spreadsheet is kept from being one.
 *
 * @param {(string | number | null | undefined)[][]} rows
 */
export function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}
