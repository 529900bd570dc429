import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { beforeAndAfter, facts, leaves, pace, progress, sentence, settings, state } from "../../web/js/run_words.js";
import { runOf, sparkline } from "../../web/js/run_widget.js";
import { strings } from "../../web/js/strings.js";
import { toasts } from "../../web/js/toasts.js";

const english = JSON.parse(readFileSync(new URL("../../locales/en/main.json", import.meta.url), "utf8"));
const { t, loaded } = strings(
  async () => ({ ok: true, json: async () => ({ en: english }) }),
  () => "en",
);
await loaded;
const ID = "0123456789abcdef";
const run = (changes) => ({ run: ID, state: "running", step: 0, can: [], ...changes });

test("progress is in steps, and of a run that prepares itself in its stage's own parts", () => {
  assert.deepEqual(progress(run({ step: 30, steps: 120 }), t, "en"), { share: 0.25, text: "step 30 of 120" });
  const preparing = run({ state: "preparing", stage: "embed pictures", done: 1, total: 8 });
  assert.deepEqual(progress(preparing, t, "en"), { share: 0.125, text: "embedding pictures: 12.5%" });
  assert.deepEqual(progress(run({ state: "preparing", stage: "odd stage" }), t, "en"), {
    share: null,
    text: "odd stage",
  });
  assert.deepEqual(progress(run({ state: "waiting" }), t, "en"), { share: null, text: "" });
});

test("a paused run says why", () => {
  assert.equal(state(run({ state: "paused", why: "generating" }), t), "Paused (while pictures are made)");
  assert.equal(state(run({ state: "paused", why: null }), t), "Paused");
});

test("pace and facts have what is known, and a run that holds or has ended has no time left", () => {
  const one = run({ eta: 3661, pairs_per_second: 412.4, memory: 6.3e9, loss: 1.5, recall: 0.5, epoch: 2, epochs: 5 });
  assert.equal(pace(one, t, "en"), "1h 1m left · 412 pairs/s");
  const known = Object.fromEntries(facts(one, t, "en"));
  assert.deepEqual(known, {
    Loss: "1.5",
    "Recall@1": "50%",
    Epoch: "2 / 5",
    Speed: "412 pairs/s",
    "Time left": "1h 1m",
    Memory: "6.3 GB",
  });
  const held = { ...one, state: "paused" };
  assert.equal(pace(held, t, "en"), "");
  assert.deepEqual(
    facts(held, t, "en").map(([name]) => name),
    ["Loss", "Recall@1", "Epoch", "Memory"],
  );
  const ended = { ...one, state: "finished" };
  assert.equal(pace(ended, t, "en"), "");
  assert.deepEqual(
    facts(ended, t, "en").map(([name]) => name),
    ["Loss", "Recall@1", "Epoch"],
  );
});

test("a run's line is the server's in English, and made of what is known in other languages", () => {
  const one = run({ step: 3, steps: 12, eta: 60, text: "step 3 of 12 · loss 0.5 · 1 min left" });
  assert.equal(sentence(one, t, "en"), one.text);
  assert.equal(sentence(one, t, "fr"), "step 3 of 12 · 1min left");
  assert.equal(sentence(run({ state: "failed", error: "no room", text: "failed: no room" }), t, "fr"), "no room");
});

test("before and after are side by side, in shares and numbers", () => {
  const measure = (step, recall, cosine) => ({
    type: "measure",
    step,
    held_out: { loss: 2 - recall },
    recall_at_1_text_to_image: recall,
    median_rank_text_to_image: 3,
    images: 9,
    drift: { penultimate: { cosine, one_minus_cosine: 1 - cosine } },
    moved: { "text.0.r": 0.1 },
  });
  const both = beforeAndAfter([measure(0, 0.25, 1), measure(40, 0.5, 0.99)], t, "en");
  assert.deepEqual(both, {
    head: ["", "step 0", "step 40"],
    rows: [
      ["held-out loss", "1.75", "1.5"],
      ["recall@1, text → image", "25%", "50%"],
      ["median rank, text → image", "3", "3"],
      ["cosine to the original: penultimate", "1", "0.99"],
    ],
  });
  assert.equal(beforeAndAfter([measure(0, 0.25, 1)], t, "en").head.length, 2);
  assert.equal(beforeAndAfter([], t, "en"), null);
});

test("a measurement in short has the same rows", () => {
  const short = {
    step: 3,
    loss: 2,
    contrastive: 1.5,
    "original:last=0.3": 0.5,
    recall_at_1_text_to_image: 0.5,
    pooled: 0.9,
    moved: {},
  };
  assert.deepEqual(
    beforeAndAfter([short], t, "en").rows.map(([name]) => name),
    [
      "held-out loss",
      "held-out: contrastive",
      "held-out: original:last=0.3",
      "recall@1, text → image",
      "cosine to the original: pooled",
    ],
  );
});

test("nested settings become rows", () => {
  const config = { lr: 1e-6, anchors: [{ weight: 0.3 }], names: ["a", "b"], none: null };
  assert.deepEqual(leaves({ config }), {
    "config.lr": 1e-6,
    "config.anchors.0.weight": 0.3,
    "config.names": "a, b",
    "config.none": null,
  });
});

test("a node's text names its run, and no other text does", () => {
  assert.equal(runOf(`run ${ID}\nstep 3 of 9`), ID);
  for (const text of ["", undefined, `run ${ID}0`, "run 0123", `rerun ${ID}`, `run ${ID.toUpperCase()}`])
    assert.equal(runOf(text), null);
});

test("the line on a node spans its box from the highest to the lowest value, however many there are", () => {
  assert.equal(sparkline([1, 2, 3], [4, 2, 3]), "0.0,2.0 120.0,32.0 240.0,17.0");
  const at = Array.from({ length: 5000 }, (_, i) => i);
  const points = sparkline(at, at).split(" ");
  assert.ok(points.length <= 242);
  assert.deepEqual([points[0], points.at(-1)], ["0.0,32.0", "240.0,2.0"]);
  assert.deepEqual([sparkline([], []), sparkline([1], [1]), sparkline([1, 2], [null, 3])], ["", "", ""]);
});

async function told(notice, { events = [], language = "en" } = {}) {
  const seen = [];
  const details = async () => ({ alarm_events: events });
  const page = {
    t,
    language: () => language,
    toast: (...words) => seen.push(words),
    details,
    queue: () => seen.push("queued"),
  };
  toasts(page)(notice);
  await new Promise((resolve) => setImmediate(resolve));
  return seen;
}

test("the end of a run is told with its state, and a failure with its error", async () => {
  const finished = await told({ type: "ended", run: run({ state: "finished", text: "recall 0.5" }) });
  assert.deepEqual(finished, [["success", `Run ${ID} has finished`, "recall 0.5"]]);
  const failed = await told({ type: "ended", run: run({ state: "failed", text: "failed", error: "no memory" }) });
  assert.deepEqual(failed, [["error", `Run ${ID} has failed`, "no memory"]]);
});

test("an alarm is told with the newest advice for this run, after the general one in other languages", async () => {
  const events = [
    { alarm: "slow", raised: true, advice: "old" },
    { alarm: "slow", raised: true, advice: "180 pairs/s" },
    { alarm: "slow", raised: false, advice: "over" },
  ];
  const notice = { type: "alarm", run: run({}), alarm: "slow" };
  const [summary, general] = [`Slower than before (run ${ID})`, english.gmp.advice.slow];
  assert.deepEqual(await told(notice, { events }), [["warn", summary, "180 pairs/s"]]);
  assert.deepEqual(await told(notice, { events, language: "de" }), [["warn", summary, `${general} 180 pairs/s`]]);
  assert.deepEqual(await told(notice), [["warn", summary, general]]);
});

test("queueing again is done and told", async () => {
  const seen = await told({ type: "again", run: run({ state: "finished" }) });
  assert.deepEqual([seen[0], seen[1][1]], ["queued", "Queued again"]);
});

test("what a run was started with is short: nothing that is not set, a row for each part that was lent", () => {
  const digest = "0123456789abcdef".repeat(4);
  const names = ["ln_final.weight", "ln_final.bias"];
  const tensors = [{ name: "text tower", tensors: 2, source: "te.safetensors", reason: "the encoder to repair", names }];
  const answer = {
    config: { epochs: 3, lr: null, anchors: [{ teacher: "original", weight: 0.3 }] },
    inputs: { text: { sha256: digest, width: 64 }, dataset: digest },
    join: { tensors: { tensors, sources: { text: { sha256: digest } } } },
    dataset: { listed: 256, missing: [], "held-out pictures": 13 },
  };
  assert.deepEqual(settings(answer), [
    ["epochs", "3"],
    ["anchors.0.teacher", "original"],
    ["anchors.0.weight", "0.3"],
    ["text.sha256", "0123456789abcdef…"],
    ["text.width", "64"],
    ["dataset", "0123456789abcdef…"],
    ["text tower", "te.safetensors (the encoder to repair)"],
    ["dataset.listed", "256"],
    ["dataset.held-out pictures", "13"],
  ]);
  assert.deepEqual(settings({ config: {}, inputs: {}, join: { tensors: null }, dataset: {} }), []);
});
