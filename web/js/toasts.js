// @ts-check
// What is told when a run ends or raises an alarm. No DOM, no ComfyUI.

import { sentence } from "./run_words.js";

const SEVERITY = { finished: "success", failed: "error", interrupted: "warn" };

/**
 * @param {{t: import("./strings.js").Translate, language: () => string, toast: (severity: string, summary: string, detail: string) => void,
 *          details: (run: string) => Promise<import("./server.js").Details>, queue: () => void}} page
 * @returns {(notice: import("./store.js").Notice) => void} a listener for the store
 */
export function toasts({ t, language, toast, details, queue }) {
  /** The alarm's advice for this run, with the numbers that were seen, is in its details. */
  async function alarm(run, name) {
    const events = await details(run.run).then(
      (answer) => answer.alarm_events,
      () => [],
    );
    const advice = events.findLast((one) => one.alarm === name && one.raised)?.advice;
    const general = advice && language().startsWith("en") ? "" : t(`advice.${name}`);
    const detail = [general, advice].filter(Boolean).join(" ");
    toast("warn", t("toast.alarm", { alarm: t(`alarms.${name}`), run: run.run }), detail);
  }

  return (notice) => {
    const { run } = notice;
    if (notice.type === "alarm") {
      alarm(run, notice.alarm);
    } else if (notice.type === "again") {
      queue();
      toast("info", t("toast.again"), t("toast.again_detail", { run: run.run }));
    } else {
      const summary = t(`toast.${run.state}`, { run: run.run });
      toast(SEVERITY[run.state], summary, sentence(run, t, language()));
    }
  };
}
