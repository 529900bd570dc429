// @ts-check
// The button on Strength Scan that sets the suggested strength where the same repaired encoder is used.

import { attribute, el, icon, write } from "./dom.js";
import { addBox, after, takePlace } from "./nodes.js";

const HEIGHT = 52; // one row of buttons, and the margin that the classic canvas leaves
/** Node with a `strength` -> the input that its repaired encoder comes in by. */
const USERS = { GmPBlendTextEncoders: "repaired", GmPApplyToCLIP: "text_encoder" };

const SUBGRAPH_INPUT = -10; // LiteGraph's id of what a link inside a subgraph comes from that begins outside

/** @typedef {{strength: number, along: string}} Suggestion along: what moves, as the nodes' `along` names it */

/** @param {unknown} text what the server writes on the node @returns {Suggestion | null} */
export function suggestedIn(text) {
  const found = /\bsuggested strength (\d+(?:\.\d+)?) along (\w+):/.exec(String(text));
  return found ? { strength: Number(found[1]), along: found[2] } : null;
}

/**
 * The nodes whose strength a scan is about: those that get the encoder that the scan gets as repaired. Apply to CLIP is
 * left out where something else than the weights moves, which it does not know.
 *
 * @param {any} graph with subgraphs in it
 * @param {any} scan a Strength Scan node
 * @param {string} along
 * @returns {any[]}
 */
export function users(graph, scan, along) {
  const encoder = origin(graph, scan, "repaired");
  if (!encoder) return [];
  return nodes(graph).filter(
    (node) =>
      USERS[node.type] &&
      (along === "weights" || widgetOf(node, "along")) &&
      origin(graph, node, USERS[node.type]) === encoder,
  );
}

/** @param {any} graph @returns {any[]} */
function nodes(graph) {
  return (graph?.nodes ?? graph?._nodes ?? []).flatMap((node) => [
    node,
    ...(node.subgraph ? nodes(node.subgraph) : []),
  ]);
}

/**
 * The node that an input's link leads to, through reroutes and over the edges of subgraphs.
 *
 * @param {any} graph with subgraphs in it @param {any} node @param {string} name of the input
 */
function origin(graph, node, name) {
  let slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  for (let seen = 0; node && slot >= 0 && seen < 100; seen += 1) {
    const link = node.graph?.getLink?.(node.inputs?.[slot]?.link); // a subgraph node has another getInputLink
    if (link && Number(link.origin_id) === SUBGRAPH_INPUT) {
      const { graph: inside } = node;
      node = nodes(graph).find((one) => one.subgraph === inside);
      slot = link.origin_slot;
      continue;
    }
    node = inmost(node.getInputNode?.(slot) ?? undefined, link?.origin_slot);
    if (node?.type !== "Reroute") return node;
    slot = 0;
  }
  return undefined;
}

/** The node that an output comes from, inside where a subgraph gives it. @param {any} node @param {number} slot */
function inmost(node, slot) {
  while (node?.subgraph) {
    const { subgraph } = node;
    const link = subgraph.getLink?.(subgraph.outputs?.[slot]?.linkIds?.[0]);
    node = link && subgraph.getNodeById(link.origin_id);
    slot = link?.origin_slot;
  }
  return node;
}

/**
 * Sets strength and way of every user of a scan's encoder. A strength that comes from another node is left alone.
 *
 * @param {any} graph @param {any} scan @param {Suggestion} suggestion
 * @returns {any[]} the nodes that were set
 */
export function apply(graph, scan, { strength, along }) {
  const found = users(graph, scan, along).filter((node) => !isLinked(node, "strength"));
  for (const node of found) {
    set(node, "strength", strength);
    set(node, "along", along);
    node.setDirtyCanvas?.(true, true);
  }
  return found;
}

/** @param {any} node @param {string} name */
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** @param {any} node @param {string} name of a widget */
const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

/** Sets a widget as a person does, so that what hangs on it follows. */
function set(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

/**
 * @param {any} node Strength Scan
 * @param {{t: import("./strings.js").Translate, graph: () => any, changed: () => void, isShown: () => boolean,
 *          toast: (severity: string, summary: string, detail: string) => void, wheel: (event: WheelEvent) => void}} page
 *        changed: the graph was changed, which can be undone; isShown: whether the page shows the node's graph
 */
export function addStrengthButton(node, page) {
  const { t, toast } = page;
  /** @returns {Suggestion | null} */
  const known = () => node.properties?.gmp_suggested ?? null;

  function use() {
    const suggestion = known();
    if (!suggestion) return toast("warn", t("strength.unknown"), t("strength.unknown_detail"));
    const found = apply(page.graph(), node, suggestion);
    if (!found.length) return toast("warn", t("use.none"), t("strength.none_detail"));
    page.changed();
    const { strength } = suggestion;
    toast("success", t("strength.done"), t("strength.done_detail", { strength, count: found.length }));
  }

  const label = el("span");
  const button = el(
    "button",
    { class: "gmp-button", type: "button", title: t("strength.hint"), on: { click: use } },
    icon("check"),
    label,
  );
  const element = el("div", { class: "gmp-widget" }, el("div", { class: "gmp-buttons" }, button));

  function update() {
    const suggestion = known();
    write(label, suggestion ? t("strength.use", { strength: suggestion.strength }) : t("strength.unknown"));
    attribute(button, "aria-disabled", suggestion === null);
    if (page.isShown()) takePlace(node, element);
  }

  /** Remembers the suggestion, which is saved with the workflow. @param {Suggestion | null} suggestion */
  function find(suggestion) {
    const isKnown = JSON.stringify(known()) === JSON.stringify(suggestion);
    node.properties ??= {};
    if (suggestion) node.properties.gmp_suggested = suggestion;
    else delete node.properties.gmp_suggested;
    update();
    if (!isKnown) page.changed(); // otherwise it is lost when the page is opened anew before the next click
  }

  addBox(node, "gmp_strength", element, HEIGHT, page.wheel);
  after(node, "onExecuted", (output) => find(suggestedIn([output?.text].flat().join("\n"))));
  after(node, "onConfigure", update);
  update();
}
