import assert from "node:assert/strict";
import { test } from "node:test";

import { figure, KINDS } from "../../web/js/figures.js";
import { rows, smooth } from "../../web/js/series.js";

const colours = { text: "#111", grid: "#999", back: "#fff" };
const look = { t: (key) => key, language: "en", smoothing: 0.9, log: false, tower: "", role: "", colours };
const HISTORY = {
  run: "0123456789abcdef",
  step: 4,
  stride: 1,
  at: [1, 2, 3, 4],
  series: {
    loss: { mean: [4, 3, null, 2] },
    "losses.contrastive": { mean: [3, 2, null, 1] },
    lr: { mean: [1, 2, 3, 4] },
    "lrs.1": { mean: [1, 2, 3, 4] },
    "lrs.0.1": { mean: [0.1, 0.2, 0.3, 0.4] },
    pairs_per_second: { mean: [9, 9, 9, 9] },
    memory: { mean: [2e9, 2e9, 2e9, 2e9] },
  },
  layers: {
    at: [1, 2, 3, 4],
    names: ["text.1.r", "text.0.r", "vision.0.r"],
    grad_norm: [
      [1, 10, 100, 0],
      [0.1, 0.1, null, 0.1],
      [5, 5, 5, 5],
    ],
    update_ratio: [[], [], []],
  },
  measures: [
    { step: 0, loss: 5, recall_at_1_text_to_image: 0.2, moved: { "text.0.r": 2e-8, "text.1.r": 0 } },
    { step: 3, loss: 2, recall_at_1_text_to_image: 0.4, moved: {} },
    { step: 4, loss: 1, recall_at_1_text_to_image: 0.6, moved: { "text.0.r": 0.01, "text.1.r": 0.02 } },
  ],
  alarms: [],
  marks: [],
};
const EMPTY = {
  ...HISTORY,
  step: 0,
  at: [],
  series: {},
  layers: { at: [], names: [], grad_norm: [], update_ratio: [] },
  measures: [],
};
const named = (made, name) => made.data.find((one) => one.name === name);

test("the loss is there raw, smoothed, and as measured on held-out pictures with the recall", () => {
  const made = figure("loss", HISTORY, look);
  assert.deepEqual(named(made, "chart.loss").y, HISTORY.series.loss.mean);
  assert.deepEqual(named(made, "chart.smoothed").y, smooth(HISTORY.at, HISTORY.series.loss.mean, 0.9));
  assert.deepEqual(
    [named(made, "chart.held_out").x, named(made, "chart.held_out").y],
    [
      [0, 3, 4],
      [5, 2, 1],
    ],
  );
  assert.deepEqual([named(made, "chart.recall").y, named(made, "chart.recall").yaxis], [[0.2, 0.4, 0.6], "y2"]);
  assert.equal(
    figure("loss", HISTORY, { ...look, smoothing: 0 }).data.some((one) => one.name === "chart.smoothed"),
    false,
  );
});

test("a spike inside a bucket shows as a band between minimum and maximum", () => {
  const loss = { mean: [4, 3, 2, 2], min: [3, 2, 1, 1], max: [5, 4, 99, 3] };
  const made = figure("loss", { ...HISTORY, series: { loss } }, look);
  const band = made.data.filter((one) => one.showlegend === false);
  assert.deepEqual(
    band.map((one) => one.y),
    [loss.min, loss.max],
  );
  assert.equal(band[1].fill, "tonexty");
  assert.deepEqual(
    made.columns.slice(1, 3).map((one) => one.values),
    [loss.min, loss.max],
  );
});

test("the axis of loss and rate is logarithmic on request, and the zoom starts afresh with it", () => {
  for (const kind of ["loss", "rate"]) {
    const [plain, log] = [false, true].map((one) => figure(kind, HISTORY, { ...look, log: one }).layout);
    assert.deepEqual([plain.yaxis.type, log.yaxis.type], [undefined, "log"]);
    assert.notEqual(plain.uirevision, log.uirevision);
  }
});

test("the zoom is kept while a run grows, and not for another run", () => {
  const zoom = (history) => figure("heat", history, look).layout.uirevision;
  assert.equal(zoom(HISTORY), zoom({ ...HISTORY, step: 99 }));
  assert.notEqual(zoom(HISTORY), zoom({ ...HISTORY, run: "f".repeat(16) }));
});

test("the heat map's colours are powers of ten of the norms, and pointing at it tells the norm", () => {
  const [trace] = figure("heat", HISTORY, { ...look, tower: "text" }).data;
  assert.deepEqual(trace.y, ["text.0.r", "text.1.r"]);
  assert.deepEqual(trace.z, [
    [-1, -1, null, -1],
    [0, 1, 2, null],
  ]);
  assert.deepEqual(trace.customdata, [
    [0.1, 0.1, null, 0.1],
    [1, 10, 100, 0],
  ]);
  assert.deepEqual(trace.colorbar.ticktext, ["1e-1", "1e0", "1e1", "1e2"]);
});

test("drift is a line per layer over the measurements that tell it", () => {
  const made = figure("drift", HISTORY, look);
  assert.deepEqual(
    made.columns.map((one) => [one.head, one.at, one.values]),
    [
      ["text.0.r", [0, 4], [2e-8, 0.01]],
      ["text.1.r", [0, 4], [0, 0.02]],
    ],
  );
  assert.deepEqual(made.data[0].y, [null, 0.01]); // what is left by rounding is no drift
});

test("every rate group has its line, and the one rate has none where there are groups", () => {
  assert.deepEqual(
    figure("rate", HISTORY, look).data.map((one) => one.name),
    ["× 1", "× 0.1"],
  );
  const { lr } = HISTORY.series;
  assert.deepEqual(
    figure("rate", { ...HISTORY, series: { lr } }, look).data.map((one) => one.name),
    ["chart.rate"],
  );
});

test("memory is drawn in gigabytes on an axis of its own, and exported in bytes", () => {
  const made = figure("speed", HISTORY, look);
  assert.deepEqual([named(made, "chart.memory").yaxis, named(made, "chart.memory").y[0]], ["y2", 2]);
  assert.equal(made.columns[1].values[0], 2e9);
});

test("a run without records has no column in any chart", () => {
  for (const kind of KINDS) assert.deepEqual([kind, figure(kind, EMPTY, look).columns.length], [kind, 0]);
});

test("what is measured between two steps has its own row in the table", () => {
  const columns = [
    { head: "loss", at: [1, 2], values: [4, 3] },
    { head: "held-out", at: [0, 2], values: [5, 2] },
  ];
  assert.deepEqual(rows(columns, "step"), [
    ["step", "loss", "held-out"],
    [0, null, 5],
    [1, 4, null],
    [2, 3, 2],
  ]);
});
