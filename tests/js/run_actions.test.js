import assert from "node:assert/strict";
import { test } from "node:test";

import { nodeErrors, readers, runActions } from "../../web/js/run_actions.js";

const [A, B] = ["a".repeat(16), "b".repeat(16)];

/** A Repaired Text Encoder node whose `run` comes from a node, if any. */
function reader(source) {
  const widgets = ["which", "step", "wait"].map((name) => ({ name, value: null }));
  const inputs = [{ name: "text" }, { name: "run" }];
  return { type: "GmPRepairedTextEncoder", inputs, widgets, getInputNode: (slot) => (slot === 1 ? source : undefined) };
}
const repair = (run) => ({ type: "GmPRepair", properties: { gmp_run: run } });
const reroute = (source) => ({ type: "Reroute", inputs: [{}], getInputNode: () => source });
const values = (node) => node.widgets.map((widget) => widget.value);

function page({ nodes = [], replies = {}, confirmed = true } = {}) {
  const seen = { toasts: [], commands: [], opened: [], posted: [], changes: 0, watched: 0, asked: 0 };
  const runs = new Map([[A, { run: A, state: "running", can: ["pause", "discard", "continue"] }]]);
  const store = {
    runs,
    watch: () => (seen.watched += 1),
    command: async (id, name) => {
      seen.commands.push([id, name]);
      if (replies.command) throw replies.command;
    },
  };
  const fetch = async (path, init) => {
    if (init) seen.posted.push([path, JSON.parse(init.body)]);
    const [status, body] = replies[path] ?? [200, {}];
    return {
      ok: status < 300,
      status,
      json: async () => body,
      text: async () => (typeof body === "string" ? body : JSON.stringify(body)),
    };
  };
  const actions = runActions({
    store,
    t: (key) => key,
    fetch,
    client: () => "client",
    graph: () => ({ nodes }),
    toast: (...words) => seen.toasts.push(words),
    confirm: async () => ((seen.asked += 1), confirmed),
    open: (path) => seen.opened.push(path),
    changed: () => (seen.changes += 1),
  });
  return { actions, seen };
}

test("the nodes behind the run's own repair are found, through reroutes and in subgraphs", () => {
  const [mine, other] = [reader(reroute(reroute(repair(A)))), reader(repair(B))];
  const nested = reader(repair(A));
  const graph = { nodes: [mine, other, { type: "x", subgraph: { nodes: [nested] } }] };
  assert.deepEqual(readers(graph, A), [mine, nested]);
});

test("the only node is taken where none is behind the run, and none of several", () => {
  const only = reader(undefined);
  assert.deepEqual(readers({ nodes: [only] }, A), [only]);
  assert.deepEqual(readers({ nodes: [only, reader(repair(B))] }, A), []);
});

test("reroutes in a circle come to an end", () => {
  const circle = { type: "Reroute", inputs: [{}], getInputNode: () => circle };
  assert.deepEqual(readers({ nodes: [reader(circle), reader(circle)] }, A), []);
});

test("a checkpoint is set on the node as a person does", () => {
  const node = reader(repair(A));
  const told = [];
  node.widgets[0].callback = (value) => told.push(value);
  const { actions, seen } = page({ nodes: [node] });
  actions.use(A, "step", 200);
  assert.deepEqual(values(node), ["step", 200, null]);
  actions.use(A, "best", 0);
  assert.deepEqual(values(node), ["best", 200, null]);
  assert.deepEqual([told, seen.changes], [["step", "best"], 2]);
});

test("where there is no node to set, that is said", () => {
  const { actions, seen } = page();
  actions.use(A, "latest", 0);
  assert.deepEqual(seen.toasts, [["warn", "use.none", "use.none_detail"]]);
  assert.equal(seen.changes, 0);
});

test("only what the run can do now is asked of it", async () => {
  const { actions, seen } = page();
  await actions.command(A, "resume");
  await actions.command(B, "pause");
  await actions.command(A, "pause");
  assert.deepEqual(seen.commands, [[A, "pause"]]);
});

test("a run is discarded only after a yes", async () => {
  const [no, yes] = [page({ confirmed: false }), page()];
  for (const { actions } of [no, yes]) await actions.command(A, "discard");
  assert.deepEqual([no.seen.asked, no.seen.commands], [1, []]);
  assert.deepEqual(yes.seen.commands, [[A, "discard"]]);
});

test("the server's own sentence is shown when it refuses", async () => {
  const { Refusal } = await import("../../web/js/server.js");
  const { actions, seen } = page({ replies: { command: new Refusal(409, "the run saves itself") } });
  await actions.command(A, "pause");
  assert.deepEqual(seen.toasts, [["error", "toast.refused", "the run saves itself"]]);
});

test("going on queues the run's own graph for this page", async () => {
  const prompt = { 1: { class_type: "GmPRepair", inputs: {} } };
  const { actions, seen } = page({ replies: { [`/gmp/runs/${A}/prompt`]: [200, prompt] } });
  await actions.command(A, "continue");
  assert.deepEqual(seen.posted, [["/prompt", { prompt, client_id: "client" }]]);
  assert.deepEqual([seen.toasts[0][1], seen.watched], ["toast.queued", 1]);
});

test("what ComfyUI has against a graph is shown", async () => {
  const against = {
    error: { message: "Prompt outputs failed validation" },
    node_errors: {
      4: { class_type: "GmPRepair", errors: [{ message: "Value not in list", details: "file: 'a.pt'" }] },
    },
  };
  const { actions, seen } = page({ replies: { "/prompt": [400, against] } });
  await actions.command(A, "continue");
  assert.deepEqual(seen.toasts, [["error", "toast.refused", "GmPRepair: Value not in list (file: 'a.pt')"]]);
});

test("an error without nodes is its message, and what is no JSON is shown as it is", () => {
  assert.equal(
    nodeErrors('{"error": {"message": "Prompt has no outputs"}, "node_errors": {}}'),
    "Prompt has no outputs",
  );
  assert.equal(nodeErrors("busy"), "busy");
});

test("a report is opened by the run's address", () => {
  const { actions, seen } = page();
  actions.report(A);
  assert.deepEqual(seen.opened, [`/gmp/runs/${A}/report`]);
});
