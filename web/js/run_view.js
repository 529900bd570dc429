// @ts-check
// The chosen run: its state, numbers, buttons, alarms, checkpoints, measurements and settings.

import { choice, options } from "./chart_pane.js";
import { attribute, el, icon, keyed, table, write } from "./dom.js";
import { beforeAndAfter, facts, progress, sentence, settings, state } from "./run_words.js";
import { alive } from "./server.js";

/** Commands and their icons, in the order of the buttons. */
export const COMMANDS = {
  pause: "pause",
  resume: "play",
  continue: "replay",
  stop: "stop",
  save: "save",
  measure: "chart-bar",
  discard: "trash",
};

/**
 * A button for a command. It stays in the tab order while it can do nothing, so that the focus is not lost.
 *
 * @param {import("./panel.js").Page} page
 * @param {string} name of the command
 * @param {() => string | null} run
 */
export function commandButton({ t, store, actions }, name, run) {
  const face = icon(COMMANDS[name]);
  const press = () => {
    const id = run();
    if (id && !element.hasAttribute("aria-disabled")) actions.command(id, name);
  };
  const kind = `gmp-button gmp-${name}`;
  const hint = t(`hint.${name}`);
  const element = el(
    "button",
    { class: kind, type: "button", title: hint, on: { click: press } },
    face,
    t(`button.${name}`),
  );
  function update() {
    const one = store.runs.get(run() ?? "");
    const asked = !!one && store.asked(one.run, name);
    attribute(element, "aria-disabled", asked || !one?.can.includes(name) ? "true" : null);
    attribute(element, "aria-busy", asked ? "true" : null);
    attribute(face, "class", `pi pi-${asked ? "spinner gmp-turning" : COMMANDS[name]}`);
  }
  return { element, update };
}

/** A bar for screen readers too. @param {string} label */
export function progressBar(label) {
  const fill = el("div", { class: "gmp-fill" });
  const element = el(
    "div",
    { class: "gmp-progress", role: "progressbar", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" },
    fill,
  );
  /** @param {number | null} share 0 to 1 @param {string} text @param {string} kind state of the run */
  function update(share, text, kind) {
    attribute(element, "aria-valuenow", share === null ? null : Math.floor(share * 100));
    attribute(element, "aria-valuetext", text || null);
    attribute(element, "data-state", kind);
    fill.style.width = `${(share ?? 0) * 100}%`;
  }
  return { element, update };
}

/**
 * `element` is what is watched, `more` what is looked up.
 *
 * @param {import("./panel.js").Page} page
 */
export function runView(page) {
  const { t, store } = page;
  const chosen = () => store.chosen;
  const title = el("h3", { class: "gmp-title" });
  const words = el("p", { class: "gmp-sentence" });
  const bar = progressBar(t("run.progress"));
  const numbers = el("dl", { class: "gmp-facts" });
  const fillNumbers = keyed(numbers, ([name]) => name, fact);
  const buttons = Object.keys(COMMANDS).map((name) => commandButton(page, name, chosen));
  const report = el(
    "button",
    {
      class: "gmp-button gmp-report",
      type: "button",
      title: t("hint.report"),
      on: { click: () => page.actions.report(chosen() ?? "") },
    },
    icon("external-link"),
    t("button.report"),
  );
  const group = el(
    "div",
    { class: "gmp-buttons", role: "group", "aria-label": t("run.buttons") },
    ...buttons.map((one) => one.element),
    report,
  );
  const offload = tick(t("run.offload"), t("hint.offload"), (on) => store.freeMemory(on));
  const again = tick(t("run.again"), t("hint.again"), (on) => store.queueAgain(chosen() ?? "", on));
  const alarms = el("ul", { class: "gmp-alarms", "aria-label": t("run.alarms") });
  const fillAlarms = keyed(
    alarms,
    (one) => `${one.alarm} ${one.raised}`,
    (one) => alarm(one, page),
  );
  const parts = [checkpoints(page), measured(page), startedWith(page)];
  const switches = el("div", { class: "gmp-switches" }, offload.element, again.element);
  const element = el(
    "section",
    { class: "gmp-run", "aria-label": t("run.title") },
    ...[title, words, bar.element, group, switches, alarms, numbers],
  );
  const more = el("div", { class: "gmp-more" }, ...parts.map((one) => one.element));

  function update() {
    const run = store.runs.get(chosen() ?? "");
    element.hidden = more.hidden = !run;
    if (!run) return;
    const language = page.language();
    const { share, text } = progress(run, t, language);
    write(title, t("run.name", { run: run.run, state: state(run, t) }));
    write(words, sentence(run, t, language));
    attribute(words, "data-state", run.state);
    bar.update(share, text, run.state);
    fillNumbers(facts(run, t, language));
    for (const one of buttons) one.update();
    offload.update(store.choices.offload);
    offload.element.hidden = !alive(run);
    again.update(store.choices.again.has(run.run));
    again.element.hidden = run.state === "finished";
    const standing = run.alarms ?? [];
    alarms.hidden = !standing.length;
    fillAlarms(standing.map((name) => newest(name, store)));
    for (const part of parts) part.update(run);
  }

  return { element, more, update };
}

/** @param {string[]} pair name and value */
function fact([name]) {
  const value = el("dd");
  const element = el("div", {}, el("dt", { text: name }), value);
  return { element, update: (/** @type {string[]} */ pair) => write(value, pair[1]) };
}

/** A switch. @param {string} text @param {string} hint @param {(on: boolean) => void} turn */
function tick(text, hint, turn) {
  const input = el("input", { type: "checkbox", role: "switch", on: { change: () => turn(input.checked) } });
  const element = el("label", { class: "gmp-tick", title: hint }, input, text);
  return { element, update: (on) => (input.checked = on) };
}

/** The newest event of an alarm. @param {string} name @param {import("./store.js").Store} store */
function newest(name, store) {
  const id = store.chosen ?? "";
  const all = [
    ...(store.records.details.get(id)?.alarm_events ?? []),
    ...(store.records.histories.get(id)?.alarms ?? []),
  ];
  return (
    all.findLast((one) => one.alarm === name && one.raised) ?? { alarm: name, raised: true, step: null, advice: "" }
  );
}

/** The server's advice has this run's numbers, in English; other languages have the general one before it. */
function alarm(one, { t, language }) {
  const name = el("strong");
  const general = el("span", { text: t(`advice.${one.alarm}`) });
  const advice = el("span", { class: "gmp-advice" });
  const element = el(
    "li",
    { class: "gmp-alarm" },
    icon("exclamation-triangle"),
    el("div", {}, name, " ", general, advice),
  );
  function update(one) {
    const what = t(`alarms.${one.alarm}`);
    write(name, one.step === null ? what : t("run.alarm_at", { alarm: what, step: one.step }));
    write(advice, one.advice ?? "");
    general.hidden = !!one.advice && language().startsWith("en");
  }
  return { element, update };
}

/** @param {import("./panel.js").Page} page */
function checkpoints({ t, store, actions }) {
  let value = "latest";
  const menu = choice(t("use.which"), (name) => (value = name));
  const press = () => {
    const step = Number(value);
    actions.use(store.chosen ?? "", step ? "step" : value, step || 0);
  };
  const button = el(
    "button",
    { class: "gmp-button gmp-use", type: "button", title: t("hint.use"), on: { click: press } },
    icon("arrow-right"),
    t("button.use"),
  );
  const element = el("div", { class: "gmp-use-row", role: "group", "aria-label": t("use.title") }, menu, button);
  function update(run) {
    const details = store.records.details.get(run.run);
    const best = details?.best ? [["best", t("use.best_step", { step: details.best.step })]] : [];
    const saved = (details?.checkpoints ?? []).toReversed().map((step) => [`${step}`, t("run.step", { step })]);
    const all = [["latest", t("use.latest")], ...best, ...saved];
    if (!all.some(([name]) => name === value)) value = "latest";
    options(menu, all, value);
    element.hidden = !details || !(saved.length || details.result || details.best);
  }
  return { element, update };
}

/** @param {import("./panel.js").Page} page */
function measured({ t, store, language }) {
  const element = el("div", {
    class: "gmp-measured gmp-scroll",
    tabindex: "0",
    role: "group",
    "aria-label": t("measured.title"),
  });
  let shown;
  function update(run) {
    const measures = store.records.details.get(run.run)?.measures;
    if (measures === shown) return;
    shown = measures;
    const both = beforeAndAfter(measures ?? [], t, language());
    element.hidden = !both;
    element.replaceChildren(...(both ? [table(t("measured.title"), both.head, both.rows)] : []));
  }
  element.hidden = true;
  return { element, update };
}

/** @param {import("./panel.js").Page} page */
function startedWith({ t, store }) {
  const body = el("div", { class: "gmp-scroll" });
  const load = () => element.open && store.chosen && store.records.config(store.chosen);
  const element = el(
    "details",
    { class: "gmp-config", on: { toggle: load } },
    el("summary", { text: t("config.title") }),
    body,
  );
  let shown;
  function update(run) {
    if (!element.open) return;
    load();
    const config = store.records.configs.get(run.run);
    if (config === shown) return;
    shown = config;
    const rows = config ? settings(config) : [];
    body.replaceChildren(table(t("config.title"), [t("config.name"), t("config.value")], rows));
  }
  return { element, update };
}
