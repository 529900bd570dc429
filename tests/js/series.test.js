import assert from "node:assert/strict";
import { test } from "node:test";

import { csv, layer, merge, parts, recall, select, smooth } from "../../web/js/series.js";

const RUN = "0123456789abcdef";

/** Numbers between 0 and 1 that are the same at every test (Park and Miller's generator). */
function numbers(seed = 1) {
  let state = seed;
  return () => (state = (state * 48271) % 2147483647) / 2147483647;
}

/** A history as the server answers it: of steps after `since`, one by one. */
function answer(since, step, changes = {}) {
  const at = Array.from({ length: step - since }, (_, i) => since + 1 + i);
  const layers = {
    at,
    names: ["text.0.r", "text.0.theta"],
    grad_norm: [at.map((one) => one * 2), at.map((one) => one * 3)],
    update_ratio: [at.map(() => null), at.map((one) => one / 10)],
  };
  return {
    version: 1,
    run: RUN,
    step,
    steps: 100,
    stride: 1,
    since,
    reset: since === 0,
    at,
    series: { loss: { mean: at.map((one) => 1 / one) }, lr: { mean: at.map(() => 7e-6) } },
    layers,
    measures: at.filter((one) => one % 10 === 0).map((one) => ({ step: one, loss: one })),
    alarms: [],
    marks: at.filter((one) => one % 10 === 0).map((one) => ({ type: "checkpoint", step: one, t: one })),
    ...changes,
  };
}

const same = (one, other) => assert.deepEqual({ ...one, since: 0, reset: true }, { ...other, since: 0, reset: true });

test("answers put behind each other are the whole, however they were cut", () => {
  const random = numbers();
  for (let round = 0; round < 50; round += 1) {
    let joined;
    for (let step = 0; step < 60;) {
      const next = Math.min(60, step + Math.floor(random() * 9));
      joined = merge(joined, answer(step, next));
      step = next;
    }
    same(joined, answer(0, 60));
  }
});

test("a reset replaces what was there, also by something shorter", () => {
  const shorter = answer(0, 12);
  assert.equal(merge(answer(0, 40), shorter), shorter);
});

test("what belongs to the step that was asked for and comes again is there once", () => {
  const old = answer(0, 20);
  const again = answer(20, 25, {
    measures: [{ step: 20, loss: 20 }],
    marks: [
      { type: "checkpoint", step: 20, t: 20 },
      { type: "paused", step: 20, t: 21 },
    ],
    alarms: [{ alarm: "slow", step: 20, raised: true }],
  });
  const joined = merge(merge(old, again), { ...again, since: 20 });
  assert.deepEqual(
    joined.measures.map((one) => one.step),
    [10, 20],
  );
  assert.deepEqual(
    joined.marks.map((one) => one.type),
    ["checkpoint", "checkpoint", "paused"],
  );
  assert.equal(joined.alarms.length, 1);
  assert.deepEqual(joined.at, answer(0, 25).at);
});

test("steps that come twice are taken once", () => {
  same(merge(answer(0, 20), answer(15, 30)), answer(0, 30));
});

test("an answer that brings nothing leaves the same object, so that nothing is drawn again", () => {
  const old = answer(0, 20);
  const nothing = answer(20, 20, { measures: [{ step: 20, loss: 20 }], reset: false });
  assert.equal(merge(old, nothing), old);
});

test("a merge changes neither of its arguments", () => {
  const [old, more] = [answer(0, 20), answer(20, 30)];
  const before = JSON.stringify([old, more]);
  merge(old, more);
  assert.equal(JSON.stringify([old, more]), before);
});

test("steps one by one behind buckets have minimum and maximum too", () => {
  const old = answer(0, 4, { stride: 4, at: [4], series: { loss: { mean: [2], min: [1], max: [9] } } });
  const { loss } = merge(old, answer(4, 6)).series;
  assert.deepEqual(loss, { mean: [2, 1 / 5, 1 / 6], min: [1, 1 / 5, 1 / 6], max: [9, 1 / 5, 1 / 6] });
});

test("a series or a layer that begins later is not known before", () => {
  const more = answer(2, 4);
  more.series = { ...more.series, text_cosine: { mean: [0.5, 0.6] } };
  more.layers = { at: [3, 4], names: ["vision.0.r"], grad_norm: [[7, 8]], update_ratio: [[null, null]] };
  const joined = merge(answer(0, 2), more);
  assert.deepEqual(joined.series.text_cosine.mean, [null, null, 0.5, 0.6]);
  assert.deepEqual(joined.layers.names, ["text.0.r", "text.0.theta", "vision.0.r"]);
  assert.deepEqual(joined.layers.grad_norm, [
    [2, 4, null, null],
    [3, 6, null, null],
    [null, null, 7, 8],
  ]);
});

/** The formula as it is written, every point with every other. */
function naive(at, values, amount, stride) {
  return values.map((value, i) => {
    if (value === null) return null;
    let [sum, weight] = [0, 0];
    values.forEach((other, j) => {
      if (other === null) return;
      const share = (at[j] - (at[j - 1] ?? 0)) * amount ** (Math.abs(at[i] - at[j]) / stride);
      sum += share * other;
      weight += share;
    });
    return sum / weight;
  });
}

test("smoothing in two passes is the formula with every pair of points", () => {
  const random = numbers(7);
  for (const stride of [1, 8]) {
    const at = [];
    for (let step = 0; at.length < 60;) at.push((step += at.length < 40 ? stride : 1));
    const values = at.map(() => (random() < 0.1 ? null : random() * 10));
    for (const amount of [0.3, 0.9, 0.99]) {
      const [one, other] = [smooth(at, values, amount, stride), naive(at, values, amount, stride)];
      one.forEach((value, i) => {
        if (other[i] === null) assert.equal(value, null);
        else assert.ok(Math.abs(value - other[i]) < 1e-9, `${value} ${other[i]}`);
      });
    }
  }
});

test("smoothing shifts nothing: a peak stays where it is, and a constant stays what it is", () => {
  const at = Array.from({ length: 41 }, (_, i) => i + 1);
  const peak = smooth(
    at,
    at.map((step) => (step === 21 ? 1 : 0)),
    0.9,
  );
  assert.equal(peak.indexOf(Math.max(...peak)), 20);
  for (let i = 1; i < 20; i += 1) assert.ok(Math.abs(peak[20 - i] - peak[20 + i]) < 1e-12);
  for (const value of smooth(
    at,
    at.map(() => 3),
    0.97,
  ))
    assert.ok(Math.abs(value - 3) < 1e-12);
});

test("no smoothing gives the values themselves", () => {
  const values = [1, null, 3];
  assert.equal(smooth([1, 2, 3], values, 0), values);
});

test("layers are chosen by tower and role, in the order of the network", () => {
  const names = [
    "logit_scale",
    "text.projection",
    "text.10.r",
    "vision.0.r",
    "text.2.theta",
    "text.2.r",
    "text.embedding",
  ];
  const ordered = [
    "text.embedding",
    "text.2.theta",
    "text.2.r",
    "text.10.r",
    "text.projection",
    "vision.0.r",
    "logit_scale",
  ];
  assert.deepEqual(select(names, "", ""), ordered);
  assert.deepEqual(select(names, "text", "r"), ["text.2.r", "text.10.r"]);
  assert.deepEqual(parts(names, "tower"), ["text", "vision"]);
  assert.deepEqual(layer("vision.11.attention"), { tower: "vision", block: 11, role: "attention" });
});

test("recall is the mean of both directions, or the one that is there", () => {
  assert.equal(recall({ step: 1, recall_at_1_text_to_image: 0.25, recall_at_1_image_to_text: 0.75 }), 0.5);
  assert.equal(recall({ step: 1, recall_at_1_text_to_image: 0.25 }), 0.25);
  assert.equal(recall({ step: 1 }), null);
});

test("CSV keeps numbers whole, quotes what it must, and starts no formula", () => {
  const rows = [
    ["step", 'a "b", c'],
    [1, 0.1 + 0.2],
    [2, null],
    [3, -1e-7],
    [4, "=1+1"],
  ];
  assert.equal(csv(rows), 'step,"a ""b"", c"\r\n1,0.30000000000000004\r\n2,\r\n3,-1e-7\r\n4,\'=1+1\r\n');
});
