// @ts-check
// The pack's one script with side effects: it tells ComfyUI's page what to do with the pack's nodes.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addFileLine } from "./file_line.js";
import { ask } from "./lookup.js";

/** Node -> the menu of `GET /gmp/file` that its `file` is chosen from. */
const ROLES = { GmPLoadTextEncoder: "text", GmPLoadVisionTower: "vision", GmPInspectFile: "any" };

/** Node -> width and height that its text needs; for those that are added, since a workflow brings its own sizes. */
const SIZES = {
  GmPInspectFile: [460, 340],
  GmPLoadTextEncoder: [340, 340],
  GmPLoadVisionTower: [340, 320],
  GmPReassembleCLIP: [380, 260],
  GmPSaveTextEncoder: [380, 420],
};

/** @type {Set<ReturnType<typeof addFileLine>>} */
const lines = new Set();

app.registerExtension({
  name: "text-encoder-repair.file-line",
  nodeCreated(node) {
    const size = SIZES[node.comfyClass];
    if (size) node.setSize(size.map((length, axis) => Math.max(length, node.size[axis])));
    const role = ROLES[node.comfyClass];
    if (!role) return;
    const line = addFileLine(node, {
      ask: (name) => ask((path) => api.fetchApi(path), role, name),
      wheel: (event) => app.canvas.processMouseWheel(event),
      isShown: () => node.graph === app.canvas.graph,
      removed: () => lines.delete(line),
    });
    if (line) lines.add(line);
  },
  refreshComboInNodes() {
    for (const line of lines) line.look(true);
  },
});

// Values that were set without a click, such as by another extension, are seen when the graph is next compared.
api.addEventListener("graphChanged", () => {
  for (const line of lines) line.look();
});
