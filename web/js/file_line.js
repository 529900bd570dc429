// @ts-check
// The line on a node that tells what the chosen file is. It is shown only: neither saved nor queued.

import { newest, NOTHING } from "./lookup.js";
import { addBox, after, takePlace } from "./nodes.js";

const HEIGHT = 77; // three lines, and the margin that the classic canvas leaves; longer ones scroll

/**
 * @param {any} node with a menu named `file`
 * @param {{ask: (name: string) => Promise<import("./lookup.js").Answer>, wheel: (event: WheelEvent) => void,
 *          isShown: () => boolean, removed: () => void}} page isShown: whether the page shows the node's graph
 * @returns {{look: (again?: boolean) => void} | undefined} nothing for a node without that menu
 */
export function addFileLine(node, page) {
  const menu = node.widgets?.find((widget) => widget.name === "file");
  if (!menu) return undefined;
  const { element, box } = build();
  const lookup = newest(page.ask, (answer) => {
    show(box, answer);
    if (page.isShown()) takePlace(node, element);
    node.setDirtyCanvas(true); // so that the classic canvas shows the chosen name at the same time
  });

  /** Looks again at the chosen name; `again` also if it has not changed, since the file may have. */
  function look(again = false) {
    const linked = node.inputs?.some((input) => input.widget?.name === "file" && input.link != null);
    const name = linked || typeof menu.value !== "string" || menu.value === NOTHING ? null : menu.value;
    lookup.want(name, again);
  }

  addBox(node, "gmp_file_line", element, HEIGHT, page.wheel);

  after(menu, "callback", () => look());
  after(node, "onConfigure", () => look());
  after(node, "onConnectionsChange", () => look());
  after(node, "onRemoved", () => {
    lookup.stop();
    page.removed();
  });
  look();
  return { look };
}

/** A box as tall as its text, in an element that either canvas may stretch. */
function build() {
  const element = document.createElement("div");
  element.className = "gmp-file-line";
  element.setAttribute("role", "status");
  element.style.overflowY = "auto";
  const box = document.createElement("div");
  Object.assign(box.style, {
    padding: "4px 8px",
    overflowWrap: "anywhere",
    font: "12px/1.35 sans-serif",
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderLeft: "3px solid var(--border-color)",
    borderRadius: "4px",
  });
  box.hidden = true;
  element.append(box);
  return { element, box };
}

/** @param {HTMLElement} box @param {import("./lookup.js").Answer | null} answer */
function show(box, answer) {
  box.hidden = !answer;
  box.textContent = answer ? answer.sentence : "";
  box.title = answer ? answer.lines.join("\n") : "";
  box.style.borderLeftColor = `var(${!answer || answer.fits ? "--border-color" : "--error-text"})`;
}
