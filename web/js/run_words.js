// @ts-check
// A run in words and rows. No DOM, no ComfyUI.

import { alive } from "./server.js";
import { bytes, duration, number, percent } from "./units.js";

/** @typedef {import("./server.js").Run} Run */
/** @typedef {import("./strings.js").Translate} Translate */

const READ_POINTS = ["penultimate", "last", "pooled", "projected"];

export const ICONS = {
  empty: "circle",
  waiting: "clock",
  preparing: "cog",
  running: "play",
  paused: "pause",
  interrupted: "exclamation-circle",
  failed: "times-circle",
  finished: "check-circle",
};

/**
 * How far a run is.
 *
 * @param {Run} run
 * @param {Translate} t
 * @param {string} language
 * @returns {{share: number | null, text: string}} share 0 to 1, null where it is not known
 */
export function progress(run, t, language) {
  if (run.state === "preparing") {
    const stage = run.stage ? t(`stage.${run.stage}`) : "";
    if (!run.total) return { share: null, text: stage };
    const share = Math.min(1, (run.done ?? 0) / run.total);
    return { share, text: t("run.part", { stage, share: percent(share, language) }) };
  }
  if (!run.steps) return { share: null, text: run.step ? t("run.step", { step: run.step }) : "" };
  return { share: Math.min(1, run.step / run.steps), text: t("run.steps", { step: run.step, steps: run.steps }) };
}

/** Why it holds or has ended, behind the state's name. @param {Run} run @param {Translate} t */
export function state(run, t) {
  const name = t(`state.${run.state}`);
  return run.state === "paused" && run.why ? t("run.because", { state: name, why: t(`why.${run.why}`) }) : name;
}

/** Pairs a second and the time that is left, of a run that trains. @param {Run} run @param {Translate} t @param {string} language */
export function pace(run, t, language) {
  if (run.state !== "running") return "";
  const parts = [];
  if (run.eta !== null && run.eta !== undefined) parts.push(t("run.left", { time: duration(run.eta, language) }));
  if (run.pairs_per_second) parts.push(t("run.rate", { rate: number(run.pairs_per_second, language, 3) }));
  return parts.join(" · ");
}

/**
 * A run in one line: the server's, which is English, or what is known of it.
 *
 * @param {Run} run @param {Translate} t @param {string} language
 */
export function sentence(run, t, language) {
  if (run.state === "failed" && run.error) return run.error;
  if (run.text && language.startsWith("en")) return run.text;
  return [progress(run, t, language).text, pace(run, t, language)].filter(Boolean).join(" · ");
}

/**
 * What is known of a run, as names and values.
 *
 * @param {Run} run @param {Translate} t @param {string} language
 * @returns {string[][]}
 */
export function facts(run, t, language) {
  const epoch = run.epoch ? (run.epochs ? `${run.epoch} / ${run.epochs}` : `${run.epoch}`) : "";
  const rate = run.pairs_per_second ? t("run.rate", { rate: number(run.pairs_per_second, language, 3) }) : "";
  const started = run.started
    ? new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(run.started * 1000)
    : "";
  const all = [
    ["loss", number(run.loss, language)],
    ["recall", percent(run.recall, language)],
    ["epoch", epoch],
    ["rate", run.state === "running" ? rate : ""],
    ["eta", run.state === "running" ? duration(run.eta, language) : ""],
    ["memory", alive(run) ? bytes(run.memory, language) : ""],
    ["device", run.device ?? ""],
    ["started", started],
    ["ahead", (run.ahead ?? []).join(", ")],
  ];
  return all.filter(([, value]) => value && value !== "–").map(([name, value]) => [t(`fact.${name}`), value]);
}

/**
 * The first and the newest measurement side by side.
 *
 * @param {any[]} measures whole, as in events.jsonl, or in short, as in the history
 * @param {Translate} t @param {string} language
 * @returns {{head: string[], rows: string[][]} | null} null where nothing was measured
 */
export function beforeAndAfter(measures, t, language) {
  const first = measures[0];
  const last = measures.at(-1);
  if (!first) return null;
  const names = Object.keys(leaves(last)).filter((name) => measureName(name, t));
  const rows = names.map((name) => {
    const share = name.startsWith("recall_at");
    const cells = [first, last].map((one) => leaves(one)[name]);
    const words = cells.map((value) => (share ? percent(value, language) : number(value, language)));
    return [measureName(name, t) ?? name, ...(first === last ? words.slice(0, 1) : words)];
  });
  const head = ["", t("measured.at", { step: first.step }), t("measured.at", { step: last.step })];
  return { head: first === last ? head.slice(0, 2) : head, rows };
}

/** @param {string} name @param {Translate} t @returns {string | null} null for what a table needs not show */
function measureName(name, t) {
  const found = /^(?:recall_at_(\d+)|(mean|median)_rank)_(text_to_image|image_to_text)$/.exec(name);
  if (found) {
    const [, k, rank, way] = found;
    const what = k ? t("measured.recall", { k }) : t(`measured.${rank}_rank`);
    return t("measured.way", { what, way: t(`measured.${way}`) });
  }
  const point = /^drift\.(.+)\.cosine$/.exec(name)?.[1] ?? READ_POINTS.find((one) => one === name);
  if (point) return t("measured.cosine", { point });
  const part = /^(?:held_out\.)?(loss|contrastive|\w+:\w+=.*)$/.exec(name)?.[1];
  if (part) return part === "loss" ? t("measured.loss") : t("measured.part", { part });
  return null;
}

/**
 * What a run was started with: settings, identity of the inputs, what lent it tensors, what the data set holds.
 *
 * @param {any} answer of `GET /gmp/runs/{id}/config`
 * @returns {string[][]} names and values, without those that are not set; digests are cut short
 */
export function settings({ config, inputs, join, dataset }) {
  const lent = (join?.tensors?.tensors ?? []).map((part) => [part.name, `${part.source} (${part.reason})`]);
  const all = [leaves(config ?? {}), leaves(inputs ?? {}), Object.fromEntries(lent), leaves(dataset ?? {}, "dataset")];
  return all
    .flatMap((part) => Object.entries(part))
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => [name, String(value).replace(/^([0-9a-f]{16})[0-9a-f]{48}$/, "$1…")]);
}

/**
 * Nested settings as rows of `a.b.c` and a value.
 *
 * @param {any} value
 * @returns {Record<string, any>}
 */
export function leaves(value, prefix = "") {
  if (value === null || typeof value !== "object") return { [prefix]: value };
  const flat = Array.isArray(value) && value.every((one) => one === null || typeof one !== "object");
  if (flat) return { [prefix]: value.join(", ") };
  const entries = Object.entries(value);
  return Object.assign({}, ...entries.map(([name, one]) => leaves(one, prefix ? `${prefix}.${name}` : name)));
}
