// @ts-check
// What the runs have recorded, pulled from the server for those that are shown. No DOM, no ComfyUI.

import { merge, MOST_POINTS } from "./series.js";
import { alive } from "./server.js";

/** @typedef {import("./server.js").Run} Run */

export class Records {
  /** @type {Map<string, import("./series.js").History>} */ histories = new Map();
  /** @type {Map<string, import("./server.js").Details>} */ details = new Map();
  /** @type {Map<string, any>} null: asked for */ configs = new Map();

  #get;
  #changed;
  /** @type {Map<string, string>} run -> what was known of it when its history was pulled */ #pulled = new Map();
  /** @type {Map<string, string>} run -> what was known of it when its details were */ #detailed = new Map();
  #pulling = new Set();

  /**
   * @param {(run: string, path: string) => Promise<any>} get nothing where it fails
   * @param {() => void} changed
   */
  constructor(get, changed) {
    this.#get = get;
    this.#changed = changed;
  }

  /** @param {string} id */
  forget(id) {
    for (const map of [this.histories, this.details, this.configs, this.#pulled, this.#detailed]) map.delete(id);
  }

  /**
   * Brings a run's history up to date, one question at a time. Of a run that has ended, it is asked for once.
   *
   * @param {Run} run @param {boolean} whole also the details, where they may have changed
   */
  async pull(run, whole) {
    const id = run.run;
    if (this.#pulling.has(id)) return;
    this.#pulling.add(id);
    try {
      const known = `${run.state} ${run.step} ${run.t}`;
      const old = this.histories.get(id);
      if (!old || alive(run) || this.#pulled.get(id) !== known) {
        const since = old && old.at.length < MOST_POINTS ? old.step : 0;
        const answer = await this.#get(id, `/gmp/runs/${id}/history?since=${since}`);
        if (!answer) return;
        this.#pulled.set(id, known);
        const history = merge(since ? old : undefined, answer);
        this.histories.set(id, history);
        if (history !== old) this.#changed();
      }
      if (whole) await this.#detail(run);
    } finally {
      this.#pulling.delete(id);
    }
  }

  /** Asks for what a run has saved and measured, when a record says that there is more of it. @param {Run} run */
  async #detail(run) {
    const id = run.run;
    const history = this.histories.get(id);
    const saved = history?.marks.findLast((mark) => mark.type === "checkpoint")?.step;
    const known = [run.state, saved, history?.measures.length, history?.alarms.length].join(" ");
    if (this.#detailed.get(id) === known) return;
    const answer = await this.#get(id, `/gmp/runs/${id}`);
    if (!answer) return;
    this.#detailed.set(id, known);
    this.details.set(id, answer);
    this.#changed();
  }

  /** Asks for a run's settings, once; a run that has just begun may have none yet. @param {string} id */
  async config(id) {
    if (this.configs.has(id)) return;
    this.configs.set(id, null);
    const answer = await this.#get(id, `/gmp/runs/${id}/config`);
    if (answer) this.configs.set(id, answer);
    else this.configs.delete(id);
    this.#changed();
  }
}
