// @ts-check
// Recipes: choosing one on a GmP Repair node sets the node's other values; the panel lists when to use which.

import { el, keyed } from "./dom.js";
import { repairs, set } from "./run_actions.js";
import { ask } from "./server.js";

/** @typedef {{name: string, when: string, inputs: Record<string, string | number | boolean>}} Preset */

/** The server's presets, asked for once. @param {import("./server.js").Fetch} fetch */
export function presets(fetch) {
  /** @type {Promise<Preset[]> | undefined} */
  let asked;
  return async () => {
    asked ??= ask(fetch, "/gmp/presets").then((answer) => answer.presets);
    try {
      return await asked;
    } catch (error) {
      asked = undefined; // the next one asks again
      throw error;
    }
  };
}

/** Sets what a preset says on a node; inputs that it does not name stay. @param {any} node @param {Preset} preset */
export function fill(node, preset) {
  for (const [name, value] of Object.entries(preset.inputs)) set(node, name, value);
  const widget = node.widgets?.find((one) => one.name === "preset");
  if (widget) widget.tooltip = preset.when;
  node.setDirtyCanvas?.(true, true);
}

/**
 * A person who chooses a preset sees at once what it sets. A workflow that is loaded keeps its own values.
 *
 * @param {any} node @param {() => Promise<Preset[]>} known @param {() => void} changed
 */
export function addPreset(node, known, changed) {
  const widget = node.widgets?.find((one) => one.name === "preset");
  if (!widget) return;
  const before = widget.callback;
  widget.callback = function (value, ...rest) {
    const answer = before?.call(this, value, ...rest);
    known().then(
      (all) => {
        const preset = all.find((one) => one.name === value);
        if (!preset || widget.value !== value) return;
        fill(node, preset);
        changed();
      },
      () => {}, // the server does not answer, and the page says so
    );
    return answer;
  };
}

/**
 * The list in the panel. "Use" sets the preset on the GmP Repair node that is selected, or on the only one.
 *
 * @param {{t: import("./strings.js").Translate, known: () => Promise<Preset[]>, graph: () => any,
 *          toast: (severity: string, summary: string, detail: string) => void}} page
 */
export function presetList({ t, known, graph, toast }) {
  const rows = el("ul", { class: "gmp-presets", "aria-label": t("presets.title") });
  const show = keyed(
    rows,
    (one) => one.name,
    (/** @type {Preset} */ one) => {
      const press = () => use(one);
      const button = el("button", { class: "gmp-button", type: "button", on: { click: press } }, t("presets.use"));
      button.setAttribute("aria-label", t("presets.use_one", { name: one.name }));
      const words = el("div", {}, el("strong", { text: one.name }), " ", el("span", { text: one.when }));
      return { element: el("li", {}, words, button), update: () => {} };
    },
  );

  /** @param {Preset} preset */
  function use(preset) {
    const all = repairs(graph());
    const selected = all.filter((node) => node.is_selected || node.selected);
    const found = selected.length ? selected : all;
    if (found.length !== 1) return toast("warn", t("presets.none"), t("presets.none_detail"));
    set(found[0], "preset", preset.name);
    toast("success", t("presets.done"), t("presets.done_detail", { name: preset.name }));
  }

  const load = () => {
    if (element.open) known().then(show, () => {});
  };
  const element = el(
    "details",
    { class: "gmp-config gmp-recipes", on: { toggle: load } },
    el("summary", { text: t("presets.title") }),
    rows,
  );
  return { element };
}
