// @ts-check
// Numbers in the page's language. No DOM, no ComfyUI.

const NOT_KNOWN = "–";

/** @param {number | null | undefined} value @returns {value is number} */
function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** @param {number | null | undefined} value @param {string} language @param {number} digits significant ones */
export function number(value, language, digits = 4) {
  if (!known(value)) return NOT_KNOWN;
  const size = Math.abs(value);
  const notation = size && (size < 1e-3 || size >= 1e6) ? "scientific" : "standard";
  const most = notation === "standard" && size >= 10 ** digits ? Math.floor(Math.log10(size)) + 1 : digits;
  return new Intl.NumberFormat(language, { maximumSignificantDigits: most, notation }).format(value);
}

/** @param {number | null | undefined} value 0 to 1 @param {string} language */
export function percent(value, language) {
  if (!known(value)) return NOT_KNOWN;
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 }).format(value);
}

/** The two largest units, such as 1h 5m. @param {number | null | undefined} seconds @param {string} language */
export function duration(seconds, language) {
  if (!known(seconds) || seconds < 0) return NOT_KNOWN;
  const whole = Math.round(seconds);
  const parts = [
    ["day", Math.floor(whole / 86400)],
    ["hour", Math.floor(whole / 3600) % 24],
    ["minute", Math.floor(whole / 60) % 60],
    ["second", whole % 60],
  ];
  const first = Math.max(
    0,
    parts.findIndex(([, value]) => value),
  );
  const shown = whole ? parts.slice(first, first + 2).filter(([, value]) => value) : parts.slice(3);
  const format = (unit, value) =>
    new Intl.NumberFormat(language, { style: "unit", unit, unitDisplay: "narrow" }).format(value);
  return shown.map(([name, value]) => format(`${name}`, Number(value))).join(" ");
}

/** @param {number | null | undefined} value @param {string} language */
export function bytes(value, language) {
  if (!known(value)) return NOT_KNOWN;
  const [unit, size] = value >= 1e9 ? ["gigabyte", 1e9] : value >= 1e6 ? ["megabyte", 1e6] : ["kilobyte", 1e3];
  const digits = { maximumFractionDigits: unit === "gigabyte" ? 1 : 0 };
  return new Intl.NumberFormat(language, { style: "unit", unit, ...digits }).format(value / size);
}
