import assert from "node:assert/strict";
import { test } from "node:test";

import { bytes, duration, number, percent } from "../../web/js/units.js";

test("durations have their two largest units", () => {
  const all = [0, 0.4, 59, 61, 3600, 3661, 86399.6, 90061].map((seconds) => duration(seconds, "en"));
  assert.deepEqual(all, ["0s", "0s", "59s", "1m 1s", "1h", "1h 1m", "1d", "1d 1h"]);
});

test("bytes are given in the unit that fits", () => {
  assert.deepEqual(
    [2e3, 5e6, 6.34e9].map((one) => bytes(one, "en")),
    ["2 kB", "5 MB", "6.3 GB"],
  );
});

test("numbers keep four digits, and very small ones are written as powers", () => {
  assert.deepEqual(
    [1.23456, 0, 7e-6, 12345.6].map((one) => number(one, "en")),
    ["1.235", "0", "7E-6", "12,346"],
  );
});

test("the page's language decides on signs and words", () => {
  assert.equal(number(1.5, "de"), "1,5");
  assert.equal(percent(0.516, "fr").replaceAll(/\s/g, " "), "51,6 %");
});

test("what is not known is a dash", () => {
  const all = [number, percent, duration, bytes].flatMap((one) =>
    [null, undefined, NaN].map((value) => one(value, "en")),
  );
  assert.deepEqual(new Set(all), new Set(["–"]));
});
