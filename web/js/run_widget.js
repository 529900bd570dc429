// @ts-check
// The run on a GmP Repair node, live. It is shown only: neither saved nor queued.

import { attribute, el, icon, write } from "./dom.js";
import { addBox, after, takePlace } from "./nodes.js";
import { commandButton, progressBar } from "./run_view.js";
import { ICONS, pace, progress, sentence, state } from "./run_words.js";
import { smooth } from "./series.js";

const HEIGHT = 160;
const WIDTH = 240; // of the drawing, which is stretched to the node's
const DEPTH = 34;
const POINTS = 240;

/** @param {unknown} text what the server writes on a node @returns {string | null} the run it is about */
export function runOf(text) {
  return /\brun ([0-9a-f]{16})\b/.exec(String(text))?.[1] ?? null;
}

/**
 * A line of the loss as points of an SVG, highest value at the top.
 *
 * @param {number[]} at @param {import("./series.js").Values} values
 */
export function sparkline(at, values) {
  const every = Math.max(1, Math.ceil(values.length / POINTS));
  const known = values
    .map((value, i) => [at[i], value])
    .filter(([, value], i) => value !== null && (i % every === 0 || i === values.length - 1));
  if (known.length < 2) return "";
  const all = known.map(([, value]) => Number(value));
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const [first, last] = [Number(known[0][0]), Number(known.at(-1)?.[0])];
  const x = (step) => ((step - first) / (last - first || 1)) * WIDTH;
  const y = (value) => 2 + (1 - (value - low) / (high - low || 1)) * (DEPTH - 4);
  return known.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
}

/**
 * @param {any} node GmP Repair
 * @param {import("./panel.js").Page} page
 * @param {{open: () => void, wheel: (event: WheelEvent) => void, isShown: () => boolean, removed: () => void}} graph
 *        open: the panel; isShown: whether the page shows the node's graph
 */
export function addRunWidget(node, page, graph) {
  const { t, store } = page;
  const run = () => node.properties?.gmp_run ?? null;
  const face = icon("circle");
  const word = el("span", { class: "gmp-state" });
  const detail = el("span", { class: "gmp-detail" });
  const bar = progressBar(t("run.progress"));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of [
    ["viewBox", `0 0 ${WIDTH} ${DEPTH}`],
    ["preserveAspectRatio", "none"],
    ["role", "img"],
    ["class", "gmp-spark"],
  ])
    svg.setAttribute(name, value);
  svg.append(line);
  const buttons = ["pause", "resume", "stop"].map((name) => commandButton(page, name, run));
  const open = () => {
    const id = run();
    if (id) store.choose(id);
    graph.open();
  };
  const panel = el(
    "button",
    { class: "gmp-button gmp-open", type: "button", title: t("hint.open"), on: { click: open } },
    icon("chart-line"),
    t("button.open"),
  );
  const group = el(
    "div",
    { class: "gmp-buttons", role: "group", "aria-label": t("run.buttons") },
    ...buttons.map((one) => one.element),
    panel,
  );
  const head = el("div", { class: "gmp-widget-head" }, face, word, detail);
  const element = el(
    "div",
    { class: "gmp-widget", role: "group", "aria-label": t("run.title") },
    head,
    bar.element,
    svg,
    group,
  );

  function update() {
    const one = store.runs.get(run() ?? "");
    const language = page.language();
    const { share, text } = one ? progress(one, t, language) : { share: null, text: "" };
    attribute(face, "class", `pi pi-${ICONS[one?.state ?? "empty"] ?? "circle"}`);
    attribute(element, "data-state", one?.state ?? "none");
    write(word, one ? state(one, t) : t(run() && store.loaded ? "widget.gone" : "widget.none"));
    const alarms = (one?.alarms ?? []).map((name) => t(`alarms.${name}`));
    write(detail, one ? [...alarms, text, pace(one, t, language)].filter(Boolean).join(" · ") : "");
    detail.title = one ? sentence(one, t, language) : "";
    bar.update(share, text, one?.state ?? "empty");
    draw();
    for (const button of buttons) button.update();
    if (graph.isShown()) takePlace(node, element);
  }

  let drawn;
  function draw() {
    const history = store.records.histories.get(run() ?? "");
    if (history === drawn && line.hasAttribute("points")) return;
    drawn = history;
    const loss = history?.series.loss?.mean ?? [];
    const at = history?.at ?? [];
    attribute(line, "points", history ? sparkline(at, smooth(at, loss, page.smoothing(), history.stride)) : "");
    svg.setAttribute(
      "aria-label",
      t("widget.loss", { loss: loss.findLast((value) => value !== null)?.toPrecision(4) ?? "–" }),
    );
  }

  /** Remembers the run, which is saved with the workflow. @param {string | null} id */
  function find(id) {
    if (!id || id === run()) return id && !store.runs.has(id) ? store.wake() : undefined;
    node.properties ??= {};
    node.properties.gmp_run = id;
    store.wake();
    update();
  }

  addBox(node, "gmp_run", element, HEIGHT, graph.wheel);

  let frame = 0;
  const soon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      update();
    });
  };
  const stop = store.subscribe(soon);
  const view = {};
  store.show(view, () => (graph.isShown() ? run() : null), false);

  after(node, "onExecuted", (output) => find(runOf([output?.text].flat().join("\n"))));
  after(node, "onConfigure", () => {
    store.wake();
    soon();
  });
  after(node, "onRemoved", () => {
    store.hide(view);
    stop();
    cancelAnimationFrame(frame);
    graph.removed();
  });
  update();
  return { find };
}
