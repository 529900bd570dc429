// @ts-check
// Asks the server what a file is, and keeps answers in the order of the questions. No DOM, no ComfyUI.

/** @typedef {{sentence: string, lines: string[], fits: boolean}} Answer */

/** What the menus show where no file is. */
export const NOTHING = "(none found)";

/**
 * @param {(path: string) => Promise<Response>} fetch
 * @param {string} role
 * @param {string} name
 * @returns {Promise<Answer>} never rejects: what went wrong is an answer too
 */
export async function ask(fetch, role, name) {
  try {
    const response = await fetch(`/gmp/file?role=${role}&name=${encodeURIComponent(name)}`);
    if (response.ok) return await response.json();
    if (response.status === 404) return trouble(`${name} is not in the model folders; press R to list them again`);
    return trouble(`${name}: ComfyUI answers with error ${response.status}; its log tells why`);
  } catch {
    return trouble("ComfyUI does not answer");
  }
}

/** @param {string} sentence @returns {Answer} */
export function trouble(sentence) {
  return { sentence, lines: [sentence], fits: false };
}

/**
 * Looks a name up once it has stood for a while; only the answer for the newest name is told.
 *
 * @param {(name: string) => Promise<Answer>} ask
 * @param {(answer: Answer | null) => void} tell null: nothing is known yet
 * @param {number} wait milliseconds
 */
export function newest(ask, tell, wait = 150) {
  /** @type {string | null} */
  let wanted = null;
  let turn = 0;
  let timer;

  /** @param {string | null} name null: there is nothing to look up @param {boolean} again also if it is the same */
  function want(name, again = false) {
    if (name === wanted && !again) return;
    if (name !== wanted) tell(null);
    wanted = name;
    stop();
    if (name === null) return;
    const mine = turn;
    timer = setTimeout(async () => {
      const answer = await ask(name);
      if (mine === turn) tell(answer);
    }, wait);
  }

  function stop() {
    turn += 1;
    clearTimeout(timer);
  }

  return { want, stop };
}
