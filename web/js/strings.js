// @ts-check
// The pack's texts in the page's language, from `GET /i18n` (locales/*/main.json). No DOM, no ComfyUI.

/** @typedef {(key: string, values?: Record<string, string | number>) => string} Translate */

/** @param {any} table @param {string} key */
function find(table, key) {
  const found = key.split(".").reduce((part, name) => part?.[name], table?.gmp);
  return typeof found === "string" ? found : undefined;
}

/**
 * Without an answer, or for a key that no table has, the text is the last part of the key.
 *
 * @param {(path: string) => Promise<Response>} fetch
 * @param {() => string | undefined} language read at every text: it can be changed while the page is open
 * @returns {{t: Translate, loaded: Promise<void>}}
 */
export function strings(fetch, language) {
  let tables = {};
  async function load() {
    try {
      const response = await fetch("/i18n");
      if (response.ok) tables = await response.json();
    } catch {
      // the page works without texts, and nobody needs to be told: ComfyUI itself does not answer
    }
  }
  /** @type {Translate} */
  function t(key, values = {}) {
    const text = find(tables[language() ?? "en"], key) ?? find(tables.en, key) ?? key.split(".").at(-1) ?? key;
    return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
  }
  return { t, loaded: load() };
}
