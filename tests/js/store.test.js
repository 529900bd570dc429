import assert from "node:assert/strict";
import { test } from "node:test";

import { Store } from "../../web/js/store.js";

const [A, B] = ["a".repeat(16), "b".repeat(16)];
const run = (id, state, changes = {}) => ({ run: id, state, step: 1, t: 1, can: [], alarms: [], ...changes });
const HISTORY = { version: 1, stride: 1, steps: 9, series: {}, measures: [], alarms: [], marks: [] };
const LAYERS = { at: [], names: [], grad_norm: [], update_ratio: [] };
const settle = async () => {
  for (let i = 0; i < 20; i += 1) await new Promise((resolve) => setImmediate(resolve));
};

/** Timers that go off when the test says so. */
function clock() {
  let time = 0;
  let timers = [];
  return {
    now: () => time,
    set: (act, wait) => {
      const timer = { act, at: time + wait };
      timers.push(timer);
      return timer;
    },
    clear: (timer) => (timers = timers.filter((one) => one !== timer)),
    async pass(milliseconds) {
      const end = time + milliseconds;
      for (;;) {
        const next = timers.filter((one) => one.at <= end).sort((one, other) => one.at - other.at)[0];
        if (!next) break;
        time = Math.max(time, next.at);
        timers = timers.filter((one) => one !== next);
        next.act();
        await settle();
      }
      time = end;
    },
  };
}

/** A store, and a server that keeps runs and what was asked. */
function page({ kept = {}, replies = {} } = {}) {
  const seen = { asked: [], notices: [], runs: [], visible: true, away: false, poll: 1, changes: 0, sent: [] };
  const time = clock();
  const storage = { getItem: (name) => kept[name] ?? null, setItem: (name, value) => (kept[name] = value) };
  const answer = (status, body) => ({
    ok: status < 300,
    status,
    json: async () => body,
    text: async () => (typeof body === "string" ? body : JSON.stringify(body)),
  });
  async function fetch(path, init) {
    seen.asked.push(path);
    if (init) seen.sent.push([init.headers, JSON.parse(init.body)]);
    if (seen.away) throw new TypeError("Failed to fetch");
    for (const [start, reply] of Object.entries(replies))
      if (path.includes(start)) return answer(...(await reply(path)));
    if (path === "/gmp/watch") return answer(200, { runs: structuredClone(seen.runs) });
    const id = path.split("/")[3]?.slice(0, 16);
    const one = seen.runs.find((run) => run.run === id);
    if (!one) return answer(404, "there is no such run");
    if (path.includes("/history")) {
      const since = Number(path.split("=")[1]);
      const at = Array.from({ length: one.step - since }, (_, i) => since + 1 + i);
      return answer(200, { ...HISTORY, run: id, step: one.step, since, reset: !since, at, layers: LAYERS });
    }
    return answer(200, { ...one, checkpoints: [], best: null, measures: [], alarm_events: [], pictures: [] });
  }
  const store = new Store({
    fetch,
    client: () => "client",
    visible: () => seen.visible,
    pollSeconds: () => seen.poll,
    tell: (notice) => seen.notices.push([notice.type, notice.run.run, notice.alarm].filter(Boolean).join(" ")),
    storage,
    clock: time,
  });
  store.subscribe(() => (seen.changes += 1));
  const count = (part) => seen.asked.filter((path) => path.includes(part)).length;
  return { store, seen, time, kept, count };
}

test("a page that opens asks to be told, and has every run in the server's order", async () => {
  const { store, seen } = page();
  seen.runs = [run(B, "finished"), run(A, "running")];
  await store.watch();
  assert.deepEqual(seen.asked, ["/gmp/watch"]);
  assert.deepEqual(seen.sent, [[{ "content-type": "application/json" }, { client: "client" }]]);
  assert.deepEqual([...store.runs.keys()], [B, A]);
  assert.equal(store.chosen, A); // the one at work
});

test("the watch is renewed while a run is at work, and not when nothing is", async () => {
  const { store, seen, time, count } = page();
  seen.runs = [run(A, "running")];
  await store.watch();
  await time.pass(60_000);
  assert.equal(count("watch"), 5); // at once and every 15 s, half of the lease
  seen.runs = [run(A, "finished")];
  await time.pass(15_000);
  const ended = count("watch");
  await time.pass(120_000);
  assert.equal(count("watch"), ended);
});

test("the watch is renewed while a view is open, and while ComfyUI has something to do", async () => {
  const { store, seen, time, count } = page();
  const view = {};
  store.show(view, () => null, true);
  await settle();
  await time.pass(60_000);
  assert.equal(count("watch"), 5);
  store.hide(view);
  await time.pass(60_000);
  const hidden = count("watch");
  assert.ok(hidden <= 6);
  store.busy = true;
  await store.watch();
  await time.pass(30_000);
  assert.equal(count("watch"), hidden + 3);
  assert.equal(seen.notices.length, 0);
});

test("history is pulled at the poll rate, from where it is, only for the run that is shown", async () => {
  const { store, seen, time } = page();
  seen.runs = [run(A, "running", { step: 3 }), run(B, "running", { step: 3 })];
  store.show({}, () => A, false);
  await settle();
  seen.runs[0].step = 5;
  await time.pass(1000);
  seen.poll = 5;
  await time.pass(10_000);
  const asked = seen.asked.filter((path) => path.includes("history")).map((path) => path.split("/").slice(3).join("/"));
  assert.deepEqual(asked.slice(0, 2), [`${A}/history?since=0`, `${A}/history?since=3`]);
  assert.ok(asked.length >= 3 && asked.length <= 5, `${asked.length}`);
  assert.ok(asked.every((path) => path.startsWith(A)));
  assert.deepEqual(store.records.histories.get(A).at, [1, 2, 3, 4, 5]);
});

test("no two questions for one run are on the way at a time", async () => {
  let release;
  const replies = { history: () => new Promise((resolve) => (release = () => resolve([500, "late"]))) };
  const { store, seen, time, count } = page({ replies });
  seen.runs = [run(A, "running")];
  store.show({}, () => A, false);
  await settle();
  await time.pass(10_000);
  assert.equal(count("history"), 1);
  release();
  await settle();
  await time.pass(2000);
  assert.equal(count("history"), 2);
});

test("nothing is pulled while no view is open or the tab is hidden, and at once when it comes back", async () => {
  const { store, seen, time, count } = page();
  seen.runs = [run(A, "running")];
  await store.watch();
  await time.pass(5000);
  assert.equal(count("history"), 0);
  const view = {};
  store.show(view, () => A, false);
  await settle();
  seen.visible = false;
  await time.pass(1000);
  const before = count("history");
  await time.pass(30_000);
  assert.equal(count("history"), before);
  seen.visible = true;
  store.wake();
  await settle();
  assert.equal(count("history"), before + 1);
  store.hide(view);
  await time.pass(1000);
  const closed = count("history");
  await time.pass(10_000);
  assert.equal(count("history"), closed);
});

test("a run that has ended is pulled once, until something about it changes", async () => {
  const { store, seen, time, count } = page();
  seen.runs = [run(A, "finished", { step: 9 })];
  store.show({}, () => A, true);
  await settle();
  await time.pass(30_000);
  assert.deepEqual([count("history"), count(`runs/${A}`) - count("history")], [1, 1]);
  store.hear([run(A, "running", { step: 9, t: 2 })]);
  await time.pass(1000);
  assert.equal(count("history"), 2);
});

test("a history of very many points is asked for anew, condensed", async () => {
  const { store, seen, time } = page();
  seen.runs = [run(A, "running", { step: 3001 })];
  store.show({}, () => A, false);
  await settle();
  await time.pass(1000);
  assert.deepEqual(
    seen.asked.filter((path) => path.includes("history")).map((path) => path.split("=")[1]),
    ["0", "0"],
  );
});

test("a server that does not answer is asked less and less, is told of, and is there again at once", async () => {
  const { store, seen, time } = page();
  seen.runs = [run(A, "running")];
  store.show({}, () => A, false);
  await settle();
  seen.away = true;
  await time.pass(1000);
  assert.equal(store.trouble, 0);
  const before = seen.asked.length;
  await time.pass(60_000);
  const asked = seen.asked.length - before;
  assert.ok(asked >= 6 && asked <= 24, `${asked}`); // at 10 s apart in the end, for the watch and the history
  assert.deepEqual([...store.runs.keys()], [A]); // what is known stays in sight
  seen.away = false;
  await time.pass(10_000);
  assert.equal(store.trouble, null);
});

test("an answer that is an error is told with its number", async () => {
  const { store } = page({ replies: { watch: () => [500, "broken"] } });
  await store.watch();
  assert.equal(store.trouble, 500);
});

test("a run that the server no longer knows is forgotten", async () => {
  const { store, seen, time } = page();
  seen.runs = [run(A, "running"), run(B, "finished")];
  store.show({}, () => A, false);
  await settle();
  seen.runs = [run(B, "finished")];
  await time.pass(1000);
  assert.deepEqual([...store.runs.keys()], [B]);
  assert.equal(store.records.histories.has(A), false);
  assert.equal(store.chosen, null);
});

test("the websocket's word counts, even when an older answer comes after it", async () => {
  let release;
  const replies = { watch: () => new Promise((resolve) => (release = resolve)) };
  const { store, time } = page({ replies });
  store.hear([run(A, "running", { step: 1 })]);
  store.watch();
  await settle();
  await time.pass(10);
  store.hear([run(A, "finished", { step: 9 }), run(B, "waiting")]);
  release([200, { runs: [run(A, "running", { step: 8 })] }]);
  await settle();
  assert.deepEqual([store.runs.get(A).state, store.runs.get(B).state], ["finished", "waiting"]);
});

test("a run of which the websocket says that nothing is left is forgotten, and not asked for", async () => {
  const { store, seen, time } = page();
  seen.runs = [run(A, "running")];
  store.wake();
  await settle();
  const view = {};
  store.show(view, () => A);
  await settle();
  seen.runs = [];
  store.hear([run(A, "empty")]);
  const before = seen.asked.length;
  await time.pass(5000);
  assert.equal(store.runs.size, 0);
  assert.deepEqual(seen.asked.slice(before).filter((path) => path.includes(A)), []);
});

test("the end of a run is told once, and never of one that had ended before", async () => {
  const { store, seen } = page();
  seen.runs = [run(A, "running"), run(B, "finished")];
  await store.watch();
  store.hear([run(A, "finished"), run(B, "finished")]);
  store.hear([run(A, "finished")]);
  seen.runs = [run(A, "finished"), run(B, "failed")];
  await store.watch();
  assert.deepEqual(seen.notices, [`ended ${A}`]);
});

test("a run that starts again and fails is told again", async () => {
  const { store, seen } = page();
  seen.runs = [run(A, "running")];
  await store.watch();
  for (const state of ["interrupted", "preparing", "failed"]) store.hear([run(A, state)]);
  assert.deepEqual(seen.notices, [`ended ${A}`, `ended ${A}`]);
});

test("an alarm is told when it is raised, once, and not when it stood before the page was opened", async () => {
  const { store, seen } = page();
  seen.runs = [run(A, "running", { alarms: ["slow"] })];
  await store.watch();
  store.hear([run(A, "running", { alarms: ["slow", "exploding"] })]);
  store.hear([run(A, "running", { alarms: [] })]);
  store.hear([run(A, "running", { alarms: ["exploding"] })]);
  store.hear([run(B, "running", { alarms: ["slow"] })]);
  assert.deepEqual(seen.notices, [`alarm ${A} exploding`, `alarm ${B} slow`]);
});

test("the graph is queued again when the run finishes, once, and not when it is stopped", async () => {
  const { store, seen, kept } = page();
  seen.runs = [run(A, "running")];
  await store.watch();
  store.queueAgain(A, true);
  store.hear([run(A, "interrupted")]);
  assert.deepEqual(seen.notices, [`ended ${A}`]);
  store.hear([run(A, "running")]);
  store.hear([run(A, "finished")]);
  store.hear([run(A, "running")]);
  store.hear([run(A, "finished")]);
  assert.deepEqual(
    seen.notices.filter((one) => one.startsWith("again")),
    [`again ${A}`],
  );
  assert.equal(kept["gmp.again"], "");
});

test("choices come back after a reload", async () => {
  const first = page();
  first.seen.runs = [run(A, "running"), run(B, "finished")];
  await first.store.watch();
  first.store.choose(B);
  first.store.queueAgain(A, true);
  first.store.freeMemory(true);
  const { store, seen } = page({ kept: first.kept });
  seen.runs = first.seen.runs;
  await store.watch();
  assert.equal(store.chosen, B);
  store.hear([run(A, "finished")]);
  assert.deepEqual(seen.notices, [`ended ${A}`, `again ${A}`]);
  assert.equal(store.choices.offload, true);
});

test("a run that finished while the page was closed queues nothing", async () => {
  const { store, seen } = page({ kept: { "gmp.again": A } });
  seen.runs = [run(A, "finished")];
  await store.watch();
  assert.deepEqual(seen.notices, []);
  assert.equal(store.choices.again.size, 0);
});

test("the panel stays at a run that ends, and turns to the next one that begins", async () => {
  const { store, seen } = page();
  seen.runs = [run(A, "running")];
  await store.watch();
  store.hear([run(B, "waiting")]);
  assert.equal(store.chosen, A);
  store.hear([run(A, "finished")]);
  assert.equal(store.chosen, A);
  store.hear([run(B, "finished")]);
  store.hear([run(B, "running")]);
  assert.equal(store.chosen, B);
});

test("a command is pending until the run's state changes", async () => {
  const { store, seen } = page({ replies: { command: () => [202, run(A, "running", { can: ["pause"], step: 2 })] } });
  seen.runs = [run(A, "running", { can: ["pause"] })];
  await store.watch();
  store.freeMemory(true);
  await store.command(A, "pause");
  assert.deepEqual(seen.sent.at(-2)[1], { command: "pause", offload: true });
  assert.equal(store.asked(A, "pause"), true);
  store.hear([run(A, "running", { can: ["pause"], step: 3, t: 3 })]);
  assert.equal(store.asked(A, "pause"), true);
  store.hear([run(A, "paused", { why: "command", can: ["resume"] })]);
  assert.equal(store.asked(A, "pause"), false);
});

test("saving is pending until the run goes on, and is not asked for twice meanwhile", async () => {
  const { store, seen, count } = page({ replies: { command: () => [202, run(A, "running", { t: 5 })] } });
  seen.runs = [run(A, "running", { t: 5 })];
  await store.watch();
  await Promise.all([store.command(A, "save"), store.command(A, "save")]);
  assert.equal(count("command"), 1);
  assert.deepEqual(seen.sent.find(([, body]) => body.command)[1], { command: "save" });
  assert.equal(store.asked(A, "save"), true);
  store.hear([run(A, "running", { t: 6 })]);
  assert.equal(store.asked(A, "save"), false);
});

test("what a command has done is seen without the websocket, and a button is free again after half a minute", async () => {
  const { store, seen, time, count } = page({ replies: { command: () => [202, seen.runs[0]] } });
  seen.runs = [run(A, "running")];
  await store.watch();
  await store.command(A, "pause");
  await settle();
  await time.pass(3000);
  assert.ok(count("watch") >= 4);
  seen.runs = [run(A, "paused")];
  await time.pass(1000);
  assert.equal(store.asked(A, "pause"), false);
  await store.command(A, "stop");
  await settle();
  await time.pass(29_000);
  assert.equal(store.asked(A, "stop"), true);
  await time.pass(2000);
  assert.equal(store.asked(A, "stop"), false);
});

test("a command that is refused is not pending, and its sentence is passed on", async () => {
  const { store, seen } = page({ replies: { command: () => [409, "the run is finished"] } });
  seen.runs = [run(A, "running")];
  await store.watch();
  await assert.rejects(store.command(A, "pause"), { status: 409, message: "the run is finished" });
  assert.equal(store.asked(A, "pause"), false);
});

test("a discarded run leaves when the server no longer lists it, and is not asked for meanwhile", async () => {
  const { store, seen, time, count } = page({ replies: { command: () => [202, run(A, "running")] } });
  seen.runs = [run(A, "running")];
  await store.watch();
  store.show({}, () => A, true);
  await settle();
  await store.command(A, "discard");
  assert.equal(store.asked(A, "discard"), true);
  const asked = count("history");
  await settle();
  seen.runs = [];
  await time.pass(1000);
  assert.equal(count("history"), asked);
  seen.runs = [];
  await time.pass(1000);
  assert.equal(store.runs.size, 0);
  assert.deepEqual(seen.notices, []);
});

test("settings are asked for once", async () => {
  const { store, seen, count } = page({ replies: { config: () => [200, { config: { batch: 2 } }] } });
  seen.runs = [run(A, "running")];
  await store.watch();
  await Promise.all([store.records.config(A), store.records.config(A)]);
  await store.records.config(A);
  assert.equal(count("config"), 1);
  assert.deepEqual(store.records.configs.get(A), { config: { batch: 2 } });
});

test("a browser that keeps nothing is no hindrance", () => {
  const refuse = () => {
    throw new Error("denied");
  };
  const store = new Store({ storage: { getItem: refuse, setItem: refuse } });
  store.freeMemory(true);
  assert.equal(store.choices.offload, true);
});
