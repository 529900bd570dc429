import assert from "node:assert/strict";
import { test } from "node:test";

import { apply, suggestedIn, users } from "../../web/js/strength.js";

/** A node whose inputs come from nodes. */
function node(type, sources = {}, values = {}) {
  const inputs = Object.keys(sources).map((name) => ({ name }));
  const widgets = Object.entries(values).map(([name, value]) => ({ name, value }));
  return { type, inputs, widgets, getInputNode: (slot) => Object.values(sources)[slot] ?? null };
}
const reroute = (source) => node("Reroute", { "": source });
const blend = (repaired, broken) => node("GmPBlendTextEncoders", { broken, repaired }, { strength: 1, along: "weights" });
const clip = (encoder) => node("GmPApplyToCLIP", { clip: null, text_encoder: encoder }, { member: "auto", strength: 1 });
const scan = (repaired) => node("GmPStrengthScan", { gmp_clip: null, repaired });
const value = (one, name) => one.widgets.find((widget) => widget.name === name)?.value;

test("the suggestion is read off the node's text, and only where there is one", () => {
  const text = "suggested strength 0.85 along r_and_theta: the smallest strength with 95% of the best gain\n· at 0: …";
  assert.deepEqual(suggestedIn(text), { strength: 0.85, along: "r_and_theta" });
  assert.deepEqual(suggestedIn("suggested strength 0 along weights: no strength improves recall"), {
    strength: 0,
    along: "weights",
  });
  assert.equal(suggestedIn("no strength is suggested, the repair is passed on whole: 12 pictures are too few"), null);
  assert.equal(suggestedIn(undefined), null);
});

test("the nodes that get the scan's repaired encoder are found, through reroutes and in subgraphs", () => {
  const [repaired, other] = [node("GmPRepairedTextEncoder"), node("GmPLoadTextEncoder")];
  const [mine, nested, put] = [blend(reroute(reroute(repaired)), other), blend(repaired, other), clip(reroute(repaired))];
  const [not, notEither, loose] = [blend(other, repaired), clip(mine), clip(null)];
  const looks = scan(reroute(repaired));
  const inside = { type: "x", subgraph: { nodes: [nested] } };
  const graph = { nodes: [repaired, mine, not, put, notEither, loose, looks, inside] };
  assert.deepEqual(users(graph, looks, "weights"), [mine, put, nested]);
});

test("Apply to CLIP, which blends weights only, is left out of other ways", () => {
  const repaired = node("GmPRepairedTextEncoder");
  const [mine, put] = [blend(repaired), clip(repaired)];
  assert.deepEqual(users({ nodes: [mine, put] }, scan(repaired), "r_and_theta"), [mine]);
});

test("a scan without a repaired encoder finds no nodes that lack one too", () => {
  assert.deepEqual(users({ nodes: [blend(null), clip(null)] }, scan(null), "weights"), []);
});

test("reroutes in a circle come to an end", () => {
  const circle = { type: "Reroute", inputs: [{}], getInputNode: () => circle };
  assert.deepEqual(users({ nodes: [blend(circle)] }, scan(circle), "weights"), []);
});

test("strength and way are set as a person does", () => {
  const repaired = node("GmPRepairedTextEncoder");
  const [mine, put] = [blend(repaired), clip(repaired)];
  const told = [];
  mine.widgets[0].callback = (strength) => told.push(strength);
  const graph = { nodes: [mine, put] };
  assert.deepEqual(apply(graph, scan(repaired), { strength: 0.85, along: "weights" }), [mine, put]);
  assert.deepEqual([value(mine, "strength"), value(put, "strength"), value(put, "along")], [0.85, 0.85, undefined]);
  apply(graph, scan(repaired), { strength: 0.7, along: "theta" });
  assert.deepEqual([value(mine, "strength"), value(mine, "along"), value(put, "strength")], [0.7, "theta", 0.85]);
  assert.deepEqual(told, [0.85, 0.7]);
});

test("a strength that comes from another node is left alone", () => {
  const repaired = node("GmPRepairedTextEncoder");
  const mine = blend(repaired);
  mine.inputs.push({ name: "strength", widget: { name: "strength" }, link: 7 });
  assert.deepEqual(apply({ nodes: [mine] }, scan(repaired), { strength: 0.5, along: "weights" }), []);
  assert.equal(value(mine, "strength"), 1);
});
