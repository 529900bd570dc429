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

test("the repaired encoder is found over the edges of subgraphs, from inside and from outside", () => {
  const [other, repaired] = [node("GmPLoadTextEncoder"), node("GmPRepairedTextEncoder")];
  const around = node("x", { broken: other, repaired });
  const from = (made, graph, name, link) => {
    made.inputs.find((input) => input.name === name).link = link;
    return Object.assign(made, { graph });
  };
  const edge = { 7: { origin_id: -10, origin_slot: 0 }, 8: { origin_id: "-10", origin_slot: 1 } };
  const inner = { nodes: [], getLink: (id) => edge[id] };
  around.subgraph = inner;
  const [mine, not] = [from(blend(null), inner, "repaired", 8), from(blend(null), inner, "repaired", 7)];
  const looks = from(scan(null), inner, "repaired", 8);
  inner.nodes.push(looks, mine, not);
  const put = clip(repaired);
  assert.deepEqual(users({ nodes: [other, repaired, around, put] }, looks, "weights"), [mine, put]);

  const links = { 5: { origin_id: 1, origin_slot: 0 }, 6: { origin_id: 2, origin_slot: 0 } };
  const subgraph = {
    nodes: [repaired],
    outputs: [{ linkIds: [6] }, { linkIds: [5] }],
    getLink: (id) => links[id],
    getNodeById: (id) => ({ 1: repaired, 2: other })[id],
  };
  const giver = { type: "y", subgraph };
  const root = { nodes: [giver], getLink: (id) => ({ origin_id: 9, origin_slot: id }) };
  const [outside, wrong] = [1, 0].map((slot) => from(blend(giver), root, "repaired", slot));
  root.nodes.push(outside, wrong);
  assert.deepEqual(users(root, scan(repaired), "weights"), [outside]);
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
