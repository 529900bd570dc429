import assert from "node:assert/strict";
import { test } from "node:test";

import { addPreset, fill, presets } from "../../web/js/presets.js";
import { repairs } from "../../web/js/run_actions.js";

const GENTLE = { name: "gentle", when: "It is barely broken.", inputs: { epochs: 1, broken_weight: 1, unknown: 2 } };

function repair() {
  const calls = [];
  const widget = (name, value) => ({ name, value, callback: (one) => calls.push([name, one]) });
  const widgets = [widget("preset", "sdxl-repair"), widget("epochs", 5), widget("broken_weight", 0), widget("seed", 7)];
  return { type: "GmPRepair", widgets, calls };
}
const values = (node) => Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
const settled = () => new Promise((done) => setTimeout(done));

test("a preset sets the inputs that it names, as a person does, and no others", () => {
  const node = repair();
  fill(node, GENTLE);
  assert.deepEqual(values(node), { preset: "sdxl-repair", epochs: 1, broken_weight: 1, seed: 7 });
  assert.deepEqual(node.calls, [
    ["epochs", 1],
    ["broken_weight", 1],
  ]);
  assert.equal(node.widgets[0].tooltip, GENTLE.when);
});

test("choosing a preset fills the node in, after what others do, and can be undone", async () => {
  const node = repair();
  let changes = 0;
  addPreset(
    node,
    async () => [GENTLE],
    () => (changes += 1),
  );
  node.widgets[0].value = "gentle";
  node.widgets[0].callback("gentle");
  await settled();
  assert.deepEqual(node.calls[0], ["preset", "gentle"]);
  assert.equal(values(node).epochs, 1);
  assert.equal(changes, 1);
});

test("an answer that comes after another choice, or none, changes nothing", async () => {
  for (const known of [async () => [GENTLE], async () => Promise.reject(new Error("silent")), async () => []]) {
    const node = repair();
    addPreset(node, known, () => assert.fail());
    node.widgets[0].callback("gentle"); // meanwhile the widget has another value
    await settled();
    assert.equal(values(node).epochs, 5);
  }
});

test("the server is asked once, and again after it did not answer", async () => {
  let asked = 0;
  const known = presets(async () => {
    asked += 1;
    if (asked === 1) throw new Error("silent");
    return { ok: true, json: async () => ({ presets: [GENTLE] }) };
  });
  await assert.rejects(known());
  assert.deepEqual(await known(), [GENTLE]);
  assert.deepEqual(await known(), [GENTLE]);
  assert.equal(asked, 2);
});

test("repairs are found in subgraphs too", () => {
  const inner = repair();
  const graph = { nodes: [{ type: "x", subgraph: { nodes: [inner] } }, { type: "GmPRepair" }] };
  assert.equal(repairs(graph).length, 2);
});
