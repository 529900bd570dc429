// @ts-check
// What the person at the page has chosen, kept for as long as the tab lives, also over a reload. No DOM, no ComfyUI.

export class Choices {
  /** @type {string | null} the run that the panel shows */ chosen;
  /** @type {Set<string>} runs after which the graph is queued again */ again;
  /** Whether pausing is to free the GPU's memory. */ offload;
  #storage;

  /** @param {Pick<Storage, "getItem" | "setItem">} storage */
  constructor(storage) {
    this.#storage = storage;
    this.chosen = this.#read("gmp.chosen") || null;
    this.again = new Set(this.#read("gmp.again").split(" ").filter(Boolean));
    this.offload = this.#read("gmp.offload") === "true";
  }

  #read(name) {
    try {
      return this.#storage.getItem(name) ?? "";
    } catch {
      return ""; // the browser keeps nothing for this page
    }
  }

  keep() {
    try {
      this.#storage.setItem("gmp.chosen", this.chosen ?? "");
      this.#storage.setItem("gmp.again", [...this.again].join(" "));
      this.#storage.setItem("gmp.offload", String(this.offload));
    } catch {
      // the browser keeps nothing for this page
    }
  }
}
