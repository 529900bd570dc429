// @ts-check
// A chart with what belongs to it: which one, axis, filters, numbers instead of lines, PNG and CSV.

import { chart, isShown, plotly, themeColours } from "./charts.js";
import { attribute, download, el, icon, table, write } from "./dom.js";
import { figure, firstRole, hasFilter, hasLogSwitch, KINDS } from "./figures.js";
import { csv, parts, rows } from "./series.js";
import { number } from "./units.js";

const NEWEST = 12; // rows of the table
const MOST_COLUMNS = 24;

/**
 * @param {import("./panel.js").Page} page
 * @param {string} kind the chart that is shown first
 */
export function chartPane(page, kind) {
  const { t, store } = page;
  const state = { kind, log: false, tower: "", role: firstRole(kind), numbers: false };
  /** @type {ReturnType<typeof chart> | undefined} */ let drawn;
  let missing = false;
  let asked = false;
  /** @type {{key: string, history?: import("./series.js").History}} what the figure was made of */
  let shown = { key: "" };
  /** @type {import("./figures.js").Figure | undefined} */ let made;

  const kinds = choice(t("chart.which"), (value) => change({ kind: value, tower: "", role: firstRole(value) }));
  options(
    kinds,
    KINDS.map((name) => [name, t(`chart.kind.${name}`)]),
    kind,
  );
  const tower = choice(t("chart.tower"), (value) => change({ tower: value }));
  const role = choice(t("chart.role"), (value) => change({ role: value }));
  const log = toggle("gmp-log", t("chart.log"), () => change({ log: !state.log }));
  const numbers = toggle("gmp-as-numbers", t("chart.numbers"), () => change({ numbers: !state.numbers }));
  const png = button("gmp-png", t("chart.png"), t("chart.png_hint"), () => drawn?.png(fileName()));
  const csvButton = button(
    "gmp-csv",
    t("chart.csv"),
    t("chart.csv_hint"),
    () => made && download(`${fileName()}.csv`, text(), "text/csv"),
  );
  const box = el("div", { class: "gmp-plot" });
  const note = el("p", { class: "gmp-note", hidden: true });
  const grid = el("div", {
    class: "gmp-numbers",
    tabindex: "0",
    role: "group",
    "aria-label": t("chart.newest"),
    hidden: true,
  });
  const picture = el("div", { class: "gmp-picture", role: "group" }, box);
  const bar = el("div", { class: "gmp-chart-bar", role: "group", "aria-label": t("chart.options") });
  bar.append(kinds, tower, role, log, numbers, png, csvButton);
  const element = el("section", { class: "gmp-pane", "aria-label": t("chart.title") }, bar, note, picture, grid);

  const fileName = () => `gmp_${store.chosen}_${state.kind}`;
  const text = () => csv(rows(made?.columns ?? [], t("chart.step")));

  function change(changes) {
    Object.assign(state, changes);
    update();
  }

  function load() {
    asked = true;
    plotly(page.plotlyUrl).then(
      (Plotly) => {
        if (!element.isConnected) return (asked = false);
        drawn = chart(box, Plotly);
        update(true);
      },
      () => {
        missing = true;
        update(true);
      },
    );
  }

  /** @param {import("./series.js").History} history */
  function filters(history) {
    const names = state.kind === "drift" ? Object.keys(history.measures.at(-1)?.moved ?? {}) : history.layers.names;
    const all = (part, label) => [["", t(label)], ...parts(names, part).map((name) => [name, t(`${part}.${name}`)])];
    options(tower, all("tower", "chart.all_towers"), state.tower);
    options(role, all("role", "chart.all_roles"), state.role);
  }

  /** @param {boolean} again also if nothing has changed */
  function update(again = false) {
    const history = store.records.histories.get(store.chosen ?? "");
    tower.hidden = role.hidden = !hasFilter(state.kind);
    log.hidden = !hasLogSwitch(state.kind);
    attribute(log, "aria-pressed", `${state.log}`);
    attribute(numbers, "aria-pressed", `${state.numbers}`);
    if (!isShown(element)) return;
    if (!asked && !state.numbers) load();
    const colours = themeColours(element);
    const look = { ...state, t, language: page.language(), smoothing: page.smoothing(), colours };
    const key = JSON.stringify([look, store.chosen]);
    if (!again && key === shown.key && history === shown.history) return;
    shown = { key, history };
    if (history && hasFilter(state.kind)) filters(history);
    made = history && figure(state.kind, history, look);
    show(history);
  }

  /** @param {import("./series.js").History | undefined} history */
  function show(history) {
    const empty = !made?.columns.length;
    const asTable = state.numbers || missing;
    const nothing = history ? "chart.empty" : "chart.loading";
    note.hidden = !empty && (!missing || state.numbers);
    write(note, t(empty ? nothing : "chart.missing"));
    picture.hidden = empty || asTable;
    grid.hidden = empty || !asTable;
    png.hidden = asTable;
    attribute(png, "aria-disabled", empty || !drawn ? "true" : null);
    attribute(csvButton, "aria-disabled", empty ? "true" : null);
    if (!made || !history || empty) return;
    const kind = t(`chart.kind.${state.kind}`);
    attribute(picture, "aria-label", t("chart.description", { kind, step: history.step }));
    if (asTable) fill(made);
    else drawn?.show(made);
  }

  /** @param {import("./figures.js").Figure} made */
  function fill(made) {
    const [head, ...all] = rows(made.columns.slice(0, MOST_COLUMNS), t("chart.step"));
    const newest = all.slice(-NEWEST).reverse();
    const language = page.language();
    const cells = newest.map(([step, ...values]) => [
      `${step}`,
      ...values.map((value) => number(Number(value ?? NaN), language)),
    ]);
    const left = made.columns.length - MOST_COLUMNS;
    const caption = t("chart.newest") + (left > 0 ? ` (${t("chart.left_out", { count: left })})` : "");
    grid.replaceChildren(table(caption, head.map(String), cells));
  }

  function remove() {
    drawn?.remove();
    drawn = undefined;
  }

  return { element, update, remove };
}

/** @param {string} label @param {(value: string) => void} choose */
export function choice(label, choose) {
  return el("select", {
    class: "gmp-select",
    "aria-label": label,
    title: label,
    on: { change: (event) => choose(event.target.value) },
  });
}

/** Fills a menu, only where it differs: an open one would close. @param {HTMLSelectElement} select @param {string[][]} all */
export function options(select, all, value) {
  const same =
    all.length === select.options.length &&
    all.every(([name, text], i) => select.options[i].value === name && select.options[i].text === text);
  if (!same) select.replaceChildren(...all.map(([name, text]) => el("option", { value: name, text })));
  if (select.value !== value) select.value = value;
}

/** @param {string} name @param {string} text @param {() => void} press */
function toggle(name, text, press) {
  return el("button", {
    class: `gmp-button ${name}`,
    type: "button",
    "aria-pressed": "false",
    text,
    on: { click: press },
  });
}

/** @param {string} name @param {string} text @param {string} hint @param {() => void} press */
function button(name, text, hint, press) {
  const click = (event) => event.currentTarget.getAttribute("aria-disabled") || press();
  return el(
    "button",
    { class: `gmp-button ${name}`, type: "button", title: hint, "aria-label": hint, on: { click } },
    icon("download"),
    text,
  );
}
