// @ts-check
// The pack's one script with side effects: it tells ComfyUI's page what to do with the pack's nodes and runs.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addFileLine } from "./file_line.js";
import { ask as askFile } from "./lookup.js";
import { after } from "./nodes.js";
import { openPanel } from "./panel.js";
import { addPreset, presets } from "./presets.js";
import { runActions } from "./run_actions.js";
import { addRunWidget, runOf } from "./run_widget.js";
import { ask } from "./server.js";
import { POLL_SECONDS, SETTINGS, SMOOTHING, WHILE_GENERATING } from "./settings.js";
import { Store } from "./store.js";
import { addStrengthButton } from "./strength.js";
import { strings } from "./strings.js";
import { toasts } from "./toasts.js";

/** Node -> the menu of `GET /gmp/file` that its `file` is chosen from. */
const ROLES = { GmPLoadTextEncoder: "text", GmPLoadVisionTower: "vision", GmPInspectFile: "any" };

/** Node -> width and height that its text needs; for those that are added, since a workflow brings its own sizes. */
const SIZES = {
  GmPBlendTextEncoders: [380, 260],
  GmPCaptionDataset: [400, 320],
  GmPCompareCLIPs: [400, 460],
  GmPDatasetReport: [420, 480],
  GmPDiagnose: [400, 380],
  GmPInspectFile: [460, 340],
  GmPInspectGmP: [400, 340],
  GmPLoadTextEncoder: [340, 340],
  GmPLoadVisionTower: [340, 320],
  GmPMeasureCLIP: [420, 440],
  GmPMixDatasets: [380, 420],
  GmPReassembleCLIP: [380, 260],
  GmPRepair: [400, 560],
  GmPSaveTextEncoder: [380, 420],
  GmPStrengthScan: [400, 420],
  GmPTarDataset: [380, 200],
};
const SIDEBAR = "gmp-runs";
const BOTTOM = "gmp-runs-wide";

const fetch = (path, init) => api.fetchApi(path, init);
const setting = (id, other) => app.extensionManager?.setting?.get(id) ?? other;
const language = () => setting("Comfy.Locale", "en");
const { t, loaded } = strings(fetch, language);

const toast = (severity, summary, detail) => {
  app.extensionManager.toast.add({ severity, summary, detail, life: 10_000 });
};
const tell = toasts({
  t,
  language,
  toast,
  details: (id) => ask(fetch, `/gmp/runs/${id}`),
  queue: () => app.queuePrompt(0, 1),
});
/** Lets a change that a script made be undone. */
function noteChange() {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

const store = new Store({
  fetch,
  client: () => api.clientId ?? undefined,
  visible: () => !document.hidden,
  pollSeconds: () => Number(setting(POLL_SECONDS, 1)) || 1,
  storage: window.sessionStorage,
  clock: {
    now: () => performance.now(),
    set: (act, wait) => setTimeout(act, wait),
    clear: (timer) => clearTimeout(timer),
  },
  tell,
});
const actions = runActions({
  store,
  t,
  fetch,
  client: () => api.clientId ?? undefined,
  graph: () => app.rootGraph ?? app.graph,
  toast,
  confirm: async (title, message) =>
    (await app.extensionManager.dialog.confirm({ title, message, type: "delete" })) === true,
  open: (path) => window.open(api.apiURL(path), "_blank", "noopener"),
  changed: noteChange,
});
const known = presets(fetch);
/** @type {import("./panel.js").Page} */
const page = {
  store,
  t,
  language,
  actions,
  smoothing: () => Number(setting(SMOOTHING, 0.9)),
  plotlyUrl: api.apiURL("/gmp/plotly.js"),
  recipes: { t, known, graph: () => app.rootGraph ?? app.graph, toast },
};

function openSidebar() {
  const { sidebarTab, command } = app.extensionManager;
  if (sidebarTab?.activeSidebarTabId !== SIDEBAR) command.execute(`Workspace.ToggleSidebarTab.${SIDEBAR}`);
}

/** A tab that holds the panel while it is open. @param {"sidebar" | "bottom"} place */
function tab(place) {
  /** @type {ReturnType<typeof openPanel> | undefined} */
  let open;
  const destroy = () => {
    open?.remove();
    open = undefined;
  };
  const render = (element) => {
    destroy();
    open = openPanel(element, page, place);
  };
  return { type: "custom", render, destroy };
}

/** @type {Set<NonNullable<ReturnType<typeof addFileLine>>>} */
const lines = new Set();

function fileLine(node) {
  const role = ROLES[node.comfyClass];
  if (!role) return;
  const line = addFileLine(node, {
    ask: (name) => askFile(fetch, role, name),
    wheel: (event) => app.canvas.processMouseWheel(event),
    isShown: () => node.graph === app.canvas.graph,
    removed: () => line && lines.delete(line),
  });
  if (line) lines.add(line);
}

/** @type {Map<any, ReturnType<typeof addRunWidget>>} node -> what shows its run */
const widgets = new Map();

function runWidget(node) {
  if (node.comfyClass !== "GmPRepair") return;
  const policy = node.widgets?.find((widget) => widget.name === "while_generating");
  if (policy) policy.value = setting(WHILE_GENERATING, policy.value); // a workflow that is loaded sets its own behind this
  addPreset(node, known, noteChange);
  const shown = addRunWidget(node, page, {
    open: openSidebar,
    wheel: (event) => app.canvas.processMouseWheel(event),
    isShown: () => node.graph === app.canvas.graph,
    removed: () => widgets.delete(node),
  });
  widgets.set(node, shown);
}

function strengthButton(node) {
  if (node.comfyClass !== "GmPStrengthScan") return;
  addStrengthButton(node, {
    t,
    toast,
    graph: () => app.rootGraph ?? app.graph,
    changed: noteChange,
    isShown: () => node.graph === app.canvas.graph,
    wheel: (event) => app.canvas.processMouseWheel(event),
  });
}

/** Shows a node's text also where its result was known already: the server sends the text when it is computed only. */
function textAgain(node) {
  if (!node.comfyClass?.startsWith("GmP")) return;
  after(node, "onExecuted", (output) => {
    const text = [output?.text ?? []].flat().join("\n");
    if (!text || node.graph !== app.canvas.graph) return; // the page looks for the id in the graph that it shows
    api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: String(node.id), text } }));
  });
}

app.registerExtension({
  name: "text-encoder-repair",
  settings: SETTINGS.map((one) => ({ ...one, onChange: () => store.wake() })), // what is shown follows at once
  commands: [
    { id: "GmP.Panel.Open", label: "GmP: open the repair panel", icon: "pi pi-chart-line", function: openSidebar },
  ],
  async setup() {
    await loaded;
    const title = t("panel.tab");
    const icon = "pi pi-chart-line";
    app.extensionManager.registerSidebarTab({
      id: SIDEBAR,
      icon,
      title,
      label: title,
      tooltip: title,
      ...tab("sidebar"),
    });
    app.registerExtension({
      name: "text-encoder-repair.wide-panel",
      bottomPanelTabs: [{ id: BOTTOM, title: t("panel.wide"), titleKey: "gmp.panel.wide", ...tab("bottom") }],
    });
    store.watch();
  },
  nodeCreated(node) {
    const size = SIZES[node.comfyClass];
    fileLine(node);
    runWidget(node);
    strengthButton(node);
    textAgain(node);
    if (size) node.setSize(size.map((length, axis) => Math.max(length, node.size[axis])));
  },
  refreshComboInNodes() {
    for (const line of lines) line.look(true);
  },
});

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./panel.css", import.meta.url).href;
document.head.append(style);

// Values that were set without a click, such as by another extension, are seen when the graph is next compared.
api.addEventListener("graphChanged", () => {
  for (const line of lines) line.look();
});

api.addEventListener("gmp.runs", ({ detail }) => store.hear(detail.runs));
for (const change of ["reconnecting", "reconnected"]) api.addEventListener(change, () => store.wake());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) store.wake();
});
// A run may begin while ComfyUI has something to do, whoever has asked for it.
api.addEventListener("status", ({ detail }) => {
  const busy = (detail?.exec_info?.queue_remaining ?? 0) > 0;
  if (busy === store.busy) return;
  store.busy = busy;
  store.watch();
});
// A node that waits for its run is executed only at the end, but tells its run before.
api.addEventListener("progress_text", ({ detail }) => {
  const run = runOf(detail?.text);
  if (!run) return;
  const path = String(detail.nodeId).split(":"); // in a subgraph: the ids of the nodes around it first
  for (const [node, shown] of widgets) {
    const isNested = node.graph !== (app.rootGraph ?? app.graph);
    if (String(node.id) === path.at(-1) && isNested === path.length > 1) shown.find(run);
  }
});
