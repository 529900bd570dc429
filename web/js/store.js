// @ts-check
// All that the page knows of the runs: what was heard over the websocket and pulled over HTTP. No DOM, no ComfyUI.

import { Choices } from "./choices.js";
import { Records } from "./records.js";
import { alive, ask, json, Refusal } from "./server.js";

/** @typedef {import("./server.js").Run} Run */
/**
 * @typedef {{type: "ended", run: Run} | {type: "again", run: Run} | {type: "alarm", run: Run, alarm: string}} Notice
 *          again: the run has finished, and the graph was to be queued when it does
 */
/**
 * What the store needs of the page. `client`: the websocket's id; `tell` hears each notice once.
 *
 * @typedef {{fetch: import("./server.js").Fetch, client: () => string | undefined, visible: () => boolean,
 *            pollSeconds: () => number, tell: (notice: Notice) => void,
 *            storage: Pick<Storage, "getItem" | "setItem">,
 *            clock: {now: () => number, set: (act: () => void, wait: number) => any, clear: (timer: any) => void}}} Page
 */

const RENEWAL = 15_000; // milliseconds; the server's lease is twice as long
const LONGEST_WAIT = 10_000; // between two questions to a server that does not answer
const PATIENCE = 30_000; // after which a button can be pressed again
const ENDED = ["finished", "failed", "interrupted"];

/** What a command changes. @param {Run} run @param {string} command */
function effect(run, command) {
  if (command === "save" || command === "measure") return `${run.t}`;
  return [run.state, run.why, run.offloaded, ...run.can].join(" ");
}

export class Store {
  /** @type {Map<string, Run>} newest first */ runs = new Map();
  /** @type {number | null} the status of an answer that failed, 0 for none, null while all is well */ trouble = null;
  /** Whether the list has come. */ loaded = false;
  /** Whether ComfyUI has something to do, so that a run may begin. */ busy = false;

  #page;
  /** @type {Map<object, {run: () => string | null, whole: boolean}>} */ #views = new Map();
  /** @type {Set<() => void>} */ #listeners = new Set();
  /** @type {Map<string, {before: string, since: number}>} "run command" */ #asked = new Map();
  /** @type {Map<string, number>} when the websocket told of a run last */ #heard = new Map();
  #toasted = new Set();
  #watching = false;
  #failures = 0;
  #retry = 0;
  #renewal;
  #beat;

  /** @param {Page} page */
  constructor(page) {
    this.#page = page;
    this.choices = new Choices(page.storage);
    this.records = new Records(
      (id, path) => this.#get(id, path),
      () => this.#changed(),
    );
  }

  /** @param {() => void} listener called after every change @returns {() => void} stops it */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The run that the panel shows: the one that was chosen, until another begins when that one is through. */
  get chosen() {
    const { chosen } = this.choices;
    return chosen && this.runs.has(chosen) ? chosen : null;
  }

  /** @param {string} id */
  choose(id) {
    this.#choose(() => (this.choices.chosen = id));
    this.#poll();
  }

  /** Says that a view is open. @param {object} view @param {() => string | null} run @param {boolean} whole with details */
  show(view, run, whole) {
    this.#views.set(view, { run, whole });
    this.wake();
  }

  /** @param {object} view */
  hide(view) {
    this.#views.delete(view);
  }

  /** Asks anew: the page was opened, came back into sight, or has its connection again. */
  wake() {
    this.#retry = 0;
    this.watch();
    this.#poll();
  }

  /** @param {string} id @param {boolean} on whether the graph is queued when this run finishes */
  queueAgain(id, on) {
    this.#choose(() => (on ? this.choices.again.add(id) : this.choices.again.delete(id)));
  }

  /** @param {boolean} on whether pausing frees the GPU's memory */
  freeMemory(on) {
    this.#choose(() => (this.choices.offload = on));
  }

  #choose(change) {
    change();
    this.choices.keep();
    this.#changed();
  }

  /** Whether a command was given and nothing has come of it yet. @param {string} id @param {string} command */
  asked(id, command) {
    const one = this.#asked.get(`${id} ${command}`);
    return !!one && this.#page.clock.now() - one.since < PATIENCE;
  }

  /** @param {string} id @param {string} command @throws {Refusal} with the server's sentence */
  async command(id, command) {
    const key = `${id} ${command}`;
    const run = this.runs.get(id);
    if (!run || this.asked(id, command)) return;
    this.#asked.set(key, { before: effect(run, command), since: this.#page.clock.now() });
    this.#changed();
    try {
      const offload = command === "pause" && this.choices.offload ? { offload: true } : {};
      const answer = await ask(this.#page.fetch, `/gmp/runs/${id}/command`, json({ command, ...offload }));
      const one = this.#asked.get(key);
      if (one && (command === "save" || command === "measure")) one.before = effect(answer, command);
      if (command !== "discard") this.hear([answer]);
    } catch (refusal) {
      this.#asked.delete(key);
      if (refusal instanceof Refusal && refusal.status === 404) this.#remove(id);
      this.#changed();
      throw refusal;
    }
    this.watch();
  }

  /** What the websocket says. @param {Run[]} runs some or all */
  hear(runs) {
    for (const run of runs) {
      this.#heard.set(run.run, this.#page.clock.now());
      if (run.state === "empty") this.#remove(run.run); // it was discarded
      else this.#take(run, this.runs.get(run.run));
    }
    this.#changed();
    this.#plan();
  }

  /** Asks for websocket events of the next 30 seconds; the answer is the state of every run. */
  async watch() {
    const client = this.#page.client();
    if (this.#watching || !client) return this.#plan();
    this.#watching = true;
    const began = this.#page.clock.now();
    try {
      const { runs } = await ask(this.#page.fetch, "/gmp/watch", json({ client }));
      this.#well();
      this.#list(runs, began);
    } catch (refusal) {
      this.#failed(refusal);
    }
    this.#watching = false;
    this.#plan();
    this.#poll();
  }

  /** @param {Run[]} runs every run, newest first @param {number} began when the question was asked */
  #list(runs, began) {
    const known = this.runs;
    this.runs = new Map();
    for (const run of runs) {
      const old = known.get(run.run);
      this.runs.set(run.run, old ?? run);
      // what the websocket has told meanwhile is newer than this answer
      if (!old || (this.#heard.get(run.run) ?? -1) <= began) this.#take(run, old);
    }
    for (const [id, run] of known) {
      if (this.runs.has(id)) continue;
      if ((this.#heard.get(id) ?? -1) > began) this.runs = new Map([[id, run], ...this.runs]);
      else this.#remove(id);
    }
    this.loaded = true;
    const all = [...this.runs.values()];
    if (!this.chosen && all.length) this.choices.chosen = (all.find(alive) ?? all[0]).run;
    this.#changed();
  }

  /** @param {Run} run @param {Run | undefined} old what was known of it */
  #take(run, old) {
    if (this.runs.has(run.run)) this.runs.set(run.run, run);
    else this.runs = new Map([[run.run, run], ...this.runs]);
    for (const [key, one] of this.#asked) {
      const [id, command] = key.split(" ");
      if (id === run.run && command !== "discard" && effect(run, command) !== one.before) this.#asked.delete(key);
    }
    const isFirst = !old && !this.loaded;
    const begins = alive(run) && !alive(old) && !isFirst;
    if (begins && !alive(this.runs.get(this.chosen ?? ""))) this.choices.chosen = run.run;
    for (const alarm of run.alarms ?? []) {
      if (this.#toasted.has(`${run.run} ${alarm}`)) continue;
      this.#toasted.add(`${run.run} ${alarm}`);
      if (!isFirst) this.#page.tell({ type: "alarm", run, alarm }); // what stood when the page was opened is old
    }
    if (alive(old) && ENDED.includes(run.state)) this.#page.tell({ type: "ended", run });
    if (run.state === "finished" && this.choices.again.has(run.run)) {
      this.queueAgain(run.run, false);
      if (alive(old)) this.#page.tell({ type: "again", run });
    }
  }

  #remove(id) {
    this.runs.delete(id);
    this.records.forget(id);
    for (const key of this.#asked.keys()) if (key.startsWith(id)) this.#asked.delete(key);
  }

  /** When to renew the watch: soon where something was asked for, else before the lease is over. */
  #plan() {
    const { clock } = this.#page;
    clock.clear(this.#renewal);
    for (const [key, one] of this.#asked) if (clock.now() - one.since >= PATIENCE) this.#asked.delete(key);
    const shown = this.#views.size && this.#page.visible();
    if (!shown && !this.busy && !this.#asked.size && ![...this.runs.values()].some(alive)) return;
    const wait = this.#failures ? this.#wait() : this.#asked.size ? 1000 : RENEWAL;
    this.#renewal = clock.set(() => this.watch(), wait);
  }

  /** Pulls what is shown, and goes on at the poll rate. */
  #poll() {
    const { clock, visible, pollSeconds } = this.#page;
    clock.clear(this.#beat);
    if (!this.#views.size || !visible()) return;
    this.#beat = clock.set(() => this.#poll(), Math.max(0.2, pollSeconds()) * 1000);
    if (clock.now() < this.#retry) return;
    const shown = new Map();
    for (const { run, whole } of this.#views.values()) shown.set(run(), whole || shown.get(run()));
    for (const [id, whole] of shown) {
      const run = this.runs.get(id);
      if (run && !this.asked(id, "discard")) this.records.pull(run, whole); // it may be gone at any moment
    }
  }

  /** @param {string} id @param {string} path @returns {Promise<any>} nothing where it fails */
  async #get(id, path) {
    try {
      const answer = await ask(this.#page.fetch, path);
      this.#well();
      return answer;
    } catch (refusal) {
      if (refusal instanceof Refusal && refusal.status === 404) {
        this.#remove(id);
        this.#changed();
      } else this.#failed(refusal);
      return undefined;
    }
  }

  #well() {
    this.#failures = 0;
    this.#retry = 0;
    if (this.trouble === null) return;
    this.trouble = null;
    this.#changed();
  }

  #failed(refusal) {
    this.#failures += 1;
    this.#retry = this.#page.clock.now() + this.#wait();
    this.trouble = refusal instanceof Refusal ? refusal.status : 0;
    this.#changed();
  }

  #wait() {
    return Math.min(LONGEST_WAIT, 500 * 2 ** this.#failures);
  }

  #changed() {
    for (const listener of this.#listeners) listener();
  }
}
