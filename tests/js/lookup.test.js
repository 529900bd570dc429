import assert from "node:assert/strict";
import { test } from "node:test";

import { ask, newest } from "../../web/js/lookup.js";

const answer = (sentence) => ({ sentence, lines: [sentence], fits: true });
const settle = () => new Promise((resolve) => setImmediate(resolve));

function response(status, body) {
  return { ok: status === 200, status, json: async () => body };
}

test("a name is sent as it is, whatever letters it has", async () => {
  const paths = [];
  await ask(async (path) => (paths.push(path), response(200, answer("x"))), "text", "sub/a&role=vision #ü.pt");
  const query = new URL(paths[0], "http://host").searchParams;
  assert.deepEqual(Object.fromEntries(query), { role: "text", name: "sub/a&role=vision #ü.pt" });
});

test("an answer is given as the server gave it", async () => {
  assert.deepEqual(await ask(async () => response(200, answer("a CLIP")), "text", "a"), answer("a CLIP"));
});

test("an error is an answer that does not fit", async () => {
  const gone = await ask(async () => response(404), "text", "a.pt");
  assert.match(gone.sentence, /^a\.pt is not in the model folders/);
  const broken = await ask(async () => response(500), "text", "a.pt");
  assert.match(broken.sentence, /error 500/);
  const silent = await ask(async () => Promise.reject(new TypeError("Failed to fetch")), "text", "a.pt");
  assert.match(silent.sentence, /does not answer/);
  assert.deepEqual([gone, broken, silent].map((one) => one.fits), [false, false, false]);
});

function watched(wait = 10) {
  const asked = [];
  const told = [];
  const replies = {};
  const lookup = newest(
    (name) => (asked.push(name), new Promise((resolve) => (replies[name] = () => resolve(answer(name))))),
    (one) => told.push(one?.sentence ?? null),
    wait,
  );
  return { asked, told, replies, lookup };
}

test("only the name that stands is asked for", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { asked, lookup } = watched();
  for (const name of ["a", "b", "c"]) {
    lookup.want(name);
    t.mock.timers.tick(9);
  }
  assert.deepEqual(asked, []);
  t.mock.timers.tick(1);
  assert.deepEqual(asked, ["c"]);
});

test("an answer that comes late is not told", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { told, replies, lookup } = watched();
  lookup.want("slow");
  t.mock.timers.tick(10);
  lookup.want("quick");
  t.mock.timers.tick(10);
  replies.quick();
  await settle();
  replies.slow();
  await settle();
  assert.deepEqual(told, [null, null, "quick"]);
});

test("the same name is asked for once, unless it is asked for again", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { asked, told, replies, lookup } = watched();
  for (const again of [false, false, true]) {
    lookup.want("a", again);
    t.mock.timers.tick(10);
    replies.a();
    await settle();
  }
  assert.deepEqual(asked, ["a", "a"]);
  assert.deepEqual(told, [null, "a", "a"]); // what stands is not taken away meanwhile
});

test("without a name there is nothing to ask and nothing to tell", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { asked, told, lookup } = watched();
  lookup.want("a");
  lookup.want(null);
  t.mock.timers.tick(100);
  assert.deepEqual([asked, told], [[], [null, null]]);
});

test("nothing is told after the end", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { asked, told, replies, lookup } = watched();
  lookup.want("a");
  t.mock.timers.tick(10);
  lookup.stop();
  replies.a();
  await settle();
  lookup.want("b");
  lookup.stop();
  t.mock.timers.tick(100);
  assert.deepEqual([asked, told], [["a"], [null, null]]);
});
