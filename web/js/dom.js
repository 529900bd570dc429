// @ts-check
// Builds elements. Text comes in as text, never as HTML: names and sentences are written by strangers.

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {{class?: string, text?: string, on?: Record<string, (event: any) => void>, [attribute: string]: any}} options
 *        what is neither class, text nor on is an attribute; true stands for an empty one, null and false for none
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function el(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  const { class: names, text, on, ...attributes } = options;
  if (names) element.className = names;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) attribute(element, name, value);
  for (const [name, listener] of Object.entries(on ?? {})) element.addEventListener(name, listener);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** @param {Element} element @param {string} name @param {any} value true: empty; null, undefined and false: none */
export function attribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value))
    element.setAttribute(name, value === true ? "" : String(value));
}

/** Sets a text only where it differs: screen readers and selections are left alone. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** An icon that says nothing to screen readers. @param {string} name of PrimeIcons, such as `pause` */
export function icon(name) {
  return el("i", { class: `pi pi-${name}`, "aria-hidden": "true" });
}

/**
 * A list whose elements stay the same from one update to the next, so that the focus stays where it is.
 *
 * @template T
 * @param {HTMLElement} parent
 * @param {(item: T) => string} key
 * @param {(item: T) => {element: HTMLElement, update: (item: T) => void}} build
 */
export function keyed(parent, key, build) {
  /** @type {Map<string, {element: HTMLElement, update: (item: T) => void}>} */
  const rows = new Map();
  return (/** @type {T[]} */ items) => {
    const keys = new Set(items.map(key));
    for (const [name, row] of rows) {
      if (keys.has(name)) continue;
      row.element.remove();
      rows.delete(name);
    }
    items.forEach((item, place) => {
      const row = rows.get(key(item)) ?? build(item);
      rows.set(key(item), row);
      if (parent.children[place] !== row.element) parent.insertBefore(row.element, parent.children[place] ?? null);
      row.update(item);
    });
  };
}

/** @param {string} caption @param {string[]} head @param {(string | number)[][]} rows the first cell heads its row */
export function table(caption, head, rows) {
  const line = (cells) =>
    el("tr", {}, ...cells.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, String(cell))));
  return el(
    "table",
    { class: "gmp-table" },
    el("caption", { text: caption }),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
    el("tbody", {}, ...rows.map(line)),
  );
}

/** Hands a file to the browser's downloads. @param {string} name @param {string} text @param {string} type */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
