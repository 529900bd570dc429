// @ts-check
// The panel: the list of runs, the chosen one, and charts. The sidebar's is compact, the bottom's is wide.

import { chartPane } from "./chart_pane.js";
import { attribute, el, icon, keyed, write } from "./dom.js";
import { presetList } from "./presets.js";
import { progressBar, runView } from "./run_view.js";
import { ICONS, pace, progress, state } from "./run_words.js";

/**
 * What views need of the page.
 *
 * @typedef {{store: import("./store.js").Store, t: import("./strings.js").Translate, language: () => string,
 *            smoothing: () => number, plotlyUrl: string, recipes: Parameters<typeof presetList>[0],
 *            actions: ReturnType<typeof import("./run_actions.js").runActions>}} Page
 */

/**
 * Puts the panel into an element until `remove` is called.
 *
 * @param {HTMLElement} parent
 * @param {Page} page
 * @param {"sidebar" | "bottom"} place
 */
export function openPanel(parent, page, place) {
  const { t, store } = page;
  const wide = place === "bottom";
  const trouble = el("p", { class: "gmp-trouble", role: "alert", hidden: true });
  const live = el("div", { class: "gmp-live", role: "status", "aria-live": "polite" });
  const list = runList(page);
  const run = runView(page);
  const panes = (wide ? ["loss", "heat"] : ["loss"]).map((kind) => chartPane(page, kind));
  const charts = el("div", { class: "gmp-charts" }, ...panes.map((pane) => pane.element));
  const parts = wide
    ? [el("div", { class: "gmp-middle" }, run.element, run.more), charts]
    : [run.element, charts, run.more];
  const columns = el("div", { class: "gmp-columns" }, list.element, ...parts);
  const element = el(
    "div",
    { class: `gmp-panel gmp-${place}`, role: "region", "aria-label": t("panel.title") },
    trouble,
    live,
    columns,
  );
  let told;
  let frame = 0;

  function update() {
    trouble.hidden = store.trouble === null;
    write(
      trouble,
      store.trouble === null ? "" : store.trouble ? t("panel.error", { status: store.trouble }) : t("panel.silent"),
    );
    list.update();
    run.update();
    charts.hidden = !store.chosen;
    for (const pane of panes) pane.update();
    announce();
  }

  /** Screen readers hear of the chosen run's state, not of its numbers. */
  function announce() {
    const one = store.runs.get(store.chosen ?? "");
    const words = one ? t("run.name", { run: one.run, state: state(one, t) }) : "";
    if (told !== undefined && told !== words) write(live, words);
    told = words;
  }

  /** Once per frame at most; never while the tab is hidden. */
  function soon() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      update();
    });
  }

  if (wide) parent.style.height = "100%"; // the bottom panel's own height, of which each column scrolls
  parent.replaceChildren(element);
  const stop = store.subscribe(soon);
  const size = new ResizeObserver(soon);
  size.observe(element);
  const theme = new MutationObserver(soon); // the theme is changed by variables on the page's root
  for (const root of [document.documentElement, document.body])
    theme.observe(root, { attributeFilter: ["class", "style"] });
  const view = {};
  store.show(view, () => store.chosen, true);
  update();

  function remove() {
    store.hide(view);
    stop();
    size.disconnect();
    theme.disconnect();
    cancelAnimationFrame(frame);
    for (const pane of panes) pane.remove();
    element.remove();
    parent.style.height = "";
  }

  return { remove };
}

/** @param {Page} page */
function runList(page) {
  const { t, store } = page;
  const rows = el("ul", { class: "gmp-list", "aria-label": t("list.title") });
  const fill = keyed(
    rows,
    (run) => run.run,
    (run) => row(run, page),
  );
  const empty = el("p", { class: "gmp-note" });
  const recipes = presetList(page.recipes);
  const element = el("nav", { class: "gmp-runs", "aria-label": t("list.title") }, empty, rows, recipes.element);
  function update() {
    const all = [...store.runs.values()];
    fill(all);
    rows.hidden = !all.length;
    empty.hidden = !!all.length;
    write(empty, t(store.loaded ? "list.empty" : "list.loading"));
  }
  return { element, update };
}

/** @param {import("./server.js").Run} run @param {Page} page */
function row(run, { t, store, language }) {
  const face = icon(ICONS[run.state] ?? "circle");
  const name = el("span", { class: "gmp-name", text: run.run });
  const word = el("span", { class: "gmp-state" });
  const alarm = el("span", { class: "gmp-alarm-count" });
  const bar = progressBar(t("run.progress"));
  bar.element.setAttribute("aria-hidden", "true"); // the same is told in words beside it
  const press = () => store.choose(run.run);
  const button = el(
    "button",
    { class: "gmp-row", type: "button", on: { click: press } },
    face,
    name,
    alarm,
    word,
    bar.element,
  );
  function update(one) {
    const { share, text } = progress(one, t, language());
    attribute(face, "class", `pi pi-${ICONS[one.state] ?? "circle"}`);
    attribute(button, "data-state", one.state);
    attribute(button, "aria-current", store.chosen === one.run ? "true" : null);
    write(word, [state(one, t), text, pace(one, t, language())].filter(Boolean).join(" · "));
    const count = one.alarms?.length ?? 0;
    write(alarm, count ? t(count === 1 ? "list.alarm" : "list.alarms", { count }) : "");
    bar.update(share, text, one.state);
  }
  return { element: el("li", {}, button), update };
}
