// @ts-check
// Asks the pack's routes (nodes/openapi.json). No DOM, no ComfyUI.

/**
 * A run, as the list, the websocket and commands tell it.
 *
 * @typedef {{run: string, state: string, step: number, can: string[], steps?: number | null, epoch?: number | null,
 *            epochs?: number | null, stage?: string | null, done?: number | null, total?: number | null,
 *            loss?: number | null, recall?: number | null, pairs_per_second?: number | null, memory?: number | null,
 *            eta?: number | null, started?: number | null, t?: number | null, device?: string | null,
 *            why?: string | null, offloaded?: boolean, ahead?: string[], alarms?: string[], text?: string,
 *            error?: string | null}} Run
 */
/**
 * @typedef {Run & {checkpoints: number[], best: {step: number, loss?: number} | null, result?: boolean,
 *                  measures: any[], alarm_events: any[], pictures: string[]}} Details
 */
/** @typedef {(path: string, init?: RequestInit) => Promise<Response>} Fetch */

const ALIVE = ["waiting", "preparing", "running", "paused"];

/** @param {Run | undefined} run whether a process is at work on it */
export function alive(run) {
  return !!run && ALIVE.includes(run.state);
}

/** The server did not do what was asked. `status` is 0 where it does not answer; `message` is its sentence. */
export class Refusal extends Error {
  /** @param {number} status @param {string} sentence */
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

/** @param {any} body @returns {RequestInit} */
export function json(body) {
  return { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
}

/**
 * @param {Fetch} fetch @param {string} path @param {RequestInit} [init]
 * @returns {Promise<any>} the JSON that is answered
 * @throws {Refusal}
 */
export async function ask(fetch, path, init) {
  let response;
  try {
    response = await fetch(path, init);
    if (response.ok) return await response.json();
  } catch {
    throw new Refusal(0, "");
  }
  const sentence = await response.text().catch(() => "");
  throw new Refusal(response.status, sentence.slice(0, 100_000));
}
