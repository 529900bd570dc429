import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import { strings } from "../../web/js/strings.js";

const LOCALES = new URL("../../locales/", import.meta.url);
const SCRIPTS = new URL("../../web/js/", import.meta.url);
const read = (path) => JSON.parse(readFileSync(new URL(path, LOCALES), "utf8"));

/** Every text of a table by its key. */
function texts(table, prefix = "") {
  return Object.entries(table).flatMap(([name, one]) =>
    typeof one === "string" ? [[prefix + name, one]] : texts(one, `${prefix}${name}.`),
  );
}
const ENGLISH = new Map(texts(read("en/main.json").gmp));
const slots = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();

async function translator(tables, language = () => "en") {
  const response = { ok: true, json: async () => tables };
  const { t, loaded } = strings(async () => response, language);
  await loaded;
  return t;
}

test("a text comes in the page's language, else in English, else as the last word of its key", async () => {
  let language = "de";
  const tables = {
    en: { gmp: { state: { paused: "Paused", failed: "Failed" } } },
    de: { gmp: { state: { paused: "Angehalten" } } },
  };
  const t = await translator(tables, () => language);
  assert.deepEqual([t("state.paused"), t("state.failed"), t("state.odd")], ["Angehalten", "Failed", "odd"]);
  language = "ja";
  assert.equal(t("state.paused"), "Paused");
});

test("values are put into their places, also where they look like places", async () => {
  const t = await translator({ en: { gmp: { a: "{x} of {y}, {z}" } } });
  assert.equal(t("a", { x: "{y}", y: "$&" }), "{y} of $&, {z}");
});

test("without the server's tables the keys' last words are shown", async () => {
  for (const fetch of [async () => Promise.reject(new TypeError("Failed to fetch")), async () => ({ ok: false })]) {
    const { t, loaded } = strings(fetch, () => "en");
    await loaded;
    assert.equal(t("button.pause"), "pause");
  }
});

test("every key in the scripts has an English text, and every text is used", () => {
  const sources = readdirSync(SCRIPTS)
    .filter((name) => name.endsWith(".js"))
    .map((name) => readFileSync(new URL(name, SCRIPTS), "utf8"))
    .join("\n");
  const used = new Set([...sources.matchAll(/"([a-z_0-9]+(?:\.[a-z_0-9]+)+)"/g)].map(([, key]) => key));
  const begun = [...sources.matchAll(/\bt\(\s*`([a-z_.]+\.)\$\{/g)].map(([, start]) => start);
  const called = [...sources.matchAll(/\bt\("([^"]+)"/g)].map(([, key]) => key);
  assert.ok(called.length > 50);
  for (const key of called) assert.ok(ENGLISH.has(key), key);
  for (const key of ENGLISH.keys()) {
    const isFound =
      used.has(key) ||
      begun.some((start) => key.startsWith(start)) ||
      key.startsWith("tower.") ||
      key.startsWith("role.") ||
      /^measured\.(mean|median)_rank$/.test(key);
    assert.ok(isFound, `${key} is used nowhere`);
  }
});

test("every state, alarm and command of the contract has its texts", () => {
  const contract = JSON.parse(readFileSync(new URL("../nodes/openapi.json", LOCALES), "utf8")).components.schemas;
  const { state, can, why } = contract.Run.properties;
  const alarms = /### Alarms\s+([^]*?)\. An/
    .exec(readFileSync(new URL("../docs/telemetry.md", LOCALES), "utf8"))[1]
    .match(/\w+/g);
  const wanted = [
    ...state.enum.map((one) => `state.${one}`),
    ...why.enum.filter(Boolean).map((one) => `why.${one}`),
    ...can.items.enum.flatMap((one) => [`button.${one}`, `hint.${one}`]),
    ...alarms.flatMap((one) => [`alarms.${one}`, `advice.${one}`]),
  ];
  assert.ok(alarms.includes("exploding"));
  assert.deepEqual(
    wanted.filter((key) => !ENGLISH.has(key)),
    [],
  );
});

test("every language has the keys and places of the English texts", () => {
  for (const language of readdirSync(LOCALES)) {
    for (const file of ["main.json", "settings.json", "commands.json"]) {
      const [other, english] = [new Map(texts(read(`${language}/${file}`))), new Map(texts(read(`en/${file}`)))];
      assert.deepEqual([...other.keys()].sort(), [...english.keys()].sort(), `${language}/${file}`);
      for (const [key, text] of english) assert.deepEqual(slots(other.get(key)), slots(text), `${language} ${key}`);
    }
  }
});

test("no text holds signs that ComfyUI's own translations would take for theirs", () => {
  for (const [key, text] of ENGLISH) assert.doesNotMatch(text, /[|]|(^|\s)@[.:]/, key);
});
