// @ts-check
// What every widget of ours needs of a node that other extensions, undo and Nodes 2.0 work on too.

/** Calls `extra` after a method that other extensions may have set too. */
export function after(object, name, extra) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    extra(...args);
    return result;
  };
}

/**
 * Nodes 2.0 puts an element into the page once: when an undo makes the node again, that of the old node stays there.
 *
 * @param {any} node @param {HTMLElement} element
 */
export function takePlace(node, element) {
  const there = document.querySelector(`[data-node-id="${node.id}"] .${element.className}`);
  if (there && there !== element) there.replaceWith(element);
}

/**
 * Puts an element at the end of a node: elsewhere, a widget that is not saved would shift the saved values of those
 * behind it. The wheel over it moves the canvas.
 *
 * @param {any} node @param {string} name @param {HTMLElement} element @param {number} height in pixels
 * @param {(event: WheelEvent) => void} wheel
 */
export function addBox(node, name, element, height, wheel) {
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  element.addEventListener(
    "wheel",
    (event) => {
      event.stopPropagation();
      const { overflowY } = element.style;
      if (overflowY === "auto" && element.scrollHeight > element.clientHeight) return; // it scrolls itself
      event.preventDefault();
      wheel(event);
    },
    { passive: false },
  );
}
