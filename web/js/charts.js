// @ts-check
// Draws figures with Plotly, which is loaded when the first chart is seen.

/** @type {Promise<any> | undefined} */
let loading;

/**
 * The script of the installed Python package plotly.
 *
 * @param {string} url
 * @returns {Promise<any>} rejects where it is not there; the next call tries again
 */
export function plotly(url) {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = () => resolve(/** @type {any} */ (window).Plotly);
    script.onerror = () => {
      script.remove();
      loading = undefined;
      reject(new Error("plotly.js did not load"));
    };
    document.head.append(script);
  });
  return loading;
}

/**
 * The colours of ComfyUI's theme as they are now.
 *
 * @param {Element} element in the page
 */
export function themeColours(element) {
  const style = getComputedStyle(element);
  const colour = (name, other) => style.getPropertyValue(name).trim() || other;
  return {
    text: colour("--input-text", "#ddd"),
    grid: "rgba(128,128,128,0.3)",
    back: colour("--comfy-menu-bg", "#353535"),
  };
}

/** @param {Element} element whether any of it can be seen, scrolled away or not */
export function isShown(element) {
  return element.isConnected && element.getClientRects().length > 0 && !document.hidden;
}

/**
 * A chart that keeps its zoom, fits its box and is drawn only while it is shown.
 *
 * @param {HTMLElement} box
 * @param {any} Plotly
 */
export function chart(box, Plotly) {
  let drawn;
  let wanted;
  const config = {
    displaylogo: false,
    responsive: false, // the box is watched instead: the window's size tells nothing of a panel that is dragged wider
    displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"],
    scrollZoom: false, // the wheel scrolls the panel
  };

  function draw() {
    if (!wanted || wanted === drawn || !isShown(box) || !box.clientWidth) return;
    drawn = wanted;
    const { data, layout } = wanted;
    Plotly.react(box, data, { ...layout, width: box.clientWidth, height: box.clientHeight }, config);
  }

  const observer = new ResizeObserver(() => {
    drawn = undefined;
    draw();
  });
  observer.observe(box);

  return {
    /** @param {import("./figures.js").Figure} figure */
    show(figure) {
      wanted = figure;
      draw();
    },
    /** @param {string} filename without an ending */
    png(filename) {
      const size = { width: Math.max(900, box.clientWidth), height: Math.max(500, box.clientHeight), scale: 2 };
      const { data, layout } = /** @type {any} */ (box); // as Plotly keeps them: with the zoom
      const opaque = { ...layout, paper_bgcolor: themeColours(box).back };
      return Plotly.downloadImage({ data, layout: opaque }, { format: "png", filename, ...size });
    },
    remove() {
      observer.disconnect();
      Plotly.purge(box);
    },
  };
}
