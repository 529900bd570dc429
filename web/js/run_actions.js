// @ts-check
// What the buttons do. The page's parts come in; nothing of ComfyUI is imported.

import { ask, json, Refusal } from "./server.js";

/**
 * The Repaired Text Encoder nodes of a graph that a run belongs to: those behind its GmP Repair node, or the only one.
 *
 * @param {any} graph with subgraphs in it
 * @param {string} run
 * @returns {any[]}
 */
export function readers(graph, run) {
  const all = nodes(graph).filter((node) => node.type === "GmPRepairedTextEncoder");
  const mine = all.filter((node) => source(node)?.properties?.gmp_run === run);
  if (mine.length) return mine;
  return all.length === 1 ? all : [];
}

/** @param {any} graph @returns {any[]} */
function nodes(graph) {
  return (graph?.nodes ?? graph?._nodes ?? []).flatMap((node) => [
    node,
    ...(node.subgraph ? nodes(node.subgraph) : []),
  ]);
}

/** The GmP Repair node behind a node's `run`, through reroutes. */
function source(node) {
  let slot = node.inputs?.findIndex((input) => input.name === "run") ?? -1;
  for (let seen = 0; node && slot >= 0 && seen < 100; seen += 1) {
    node = node.getInputNode?.(slot);
    if (node?.type === "GmPRepair") return node;
    slot = 0;
    if (node?.type !== "Reroute") return undefined;
  }
  return undefined;
}

/** The GmP Repair nodes of a graph. @param {any} graph with subgraphs in it @returns {any[]} */
export function repairs(graph) {
  return nodes(graph).filter((node) => node.type === "GmPRepair");
}

/** Sets a widget as a person does, so that what hangs on it follows. @param {any} node @param {string} name */
export function set(node, name, value) {
  const widget = node.widgets?.find((widget) => widget.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

/**
 * @param {{store: import("./store.js").Store, t: import("./strings.js").Translate,
 *          fetch: import("./server.js").Fetch, client: () => string | undefined, graph: () => any,
 *          toast: (severity: string, summary: string, detail: string) => void,
 *          confirm: (title: string, message: string) => Promise<boolean>, open: (path: string) => void,
 *          changed: () => void}} page changed: the graph was changed, which can be undone
 */
export function runActions({ store, t, fetch, client, graph, toast, confirm, open, changed }) {
  /** @param {unknown} error */
  function complain(error) {
    const refusal = error instanceof Refusal ? error : new Refusal(0, String(error));
    const detail =
      refusal.message || (refusal.status ? t("panel.error", { status: refusal.status }) : t("panel.silent"));
    toast("error", t("toast.refused"), detail);
  }

  /** @param {string} id @param {string} name of a command */
  async function command(id, name) {
    const run = store.runs.get(id);
    if (!run?.can.includes(name)) return;
    if (name === "continue") return goOn(id);
    if (name === "discard" && !(await confirm(t("discard.title"), t("discard.question", { run: id })))) return;
    await store.command(id, name).catch(complain);
  }

  /** Queues the part of the graph that has started the run, also if another graph is open now. */
  async function goOn(id) {
    try {
      const prompt = await ask(fetch, `/gmp/runs/${id}/prompt`);
      await ask(fetch, "/prompt", json({ prompt, client_id: client() }));
      toast("info", t("toast.queued"), t("toast.queued_detail", { run: id }));
      store.watch();
    } catch (error) {
      if (error instanceof Refusal && error.status === 400)
        return toast("error", t("toast.refused"), nodeErrors(error.message));
      complain(error);
    }
  }

  /** @param {string} id @param {string} which latest, best or step @param {number} step */
  function use(id, which, step) {
    const found = readers(graph(), id);
    if (!found.length) return toast("warn", t("use.none"), t("use.none_detail"));
    for (const node of found) {
      set(node, "which", which);
      if (which === "step") set(node, "step", step);
      node.setDirtyCanvas?.(true, true);
    }
    changed();
    const chosen = which === "step" ? t("run.step", { step }) : t(`use.${which}`);
    toast("success", t("use.done"), t("use.done_detail", { which: chosen, count: found.length }));
  }

  return { command, use, report: (/** @type {string} */ id) => open(`/gmp/runs/${id}/report`) };
}

/** What ComfyUI says of a prompt that it does not take, in one line. @param {string} body JSON */
export function nodeErrors(body) {
  try {
    const { error, node_errors } = JSON.parse(body);
    const each = Object.values(node_errors ?? {}).flatMap((/** @type {any} */ node) =>
      (node.errors ?? []).map((one) => `${node.class_type}: ${one.message}${one.details ? ` (${one.details})` : ""}`),
    );
    return each.join("; ") || error?.message || body;
  } catch {
    return body;
  }
}
