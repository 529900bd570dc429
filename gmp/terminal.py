"""What a person sees of a generator of events in a terminal: progress bars, sentences, and what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

from .data.captions import printable
from .events import Event, finish

MORE = ", … (all are in dataset.json)"


def show(events: Iterator[Event], describe: Callable[[Event], str | None] = lambda event: None):
    """Progress bars on standard error for a generator of events; returns what the generator returns."""
    from tqdm import tqdm

    bar, stage = None, None

    def hear(event: Event) -> None:
        nonlocal bar, stage
        if event["type"] in ("progress", "step"):
            name = event.get("stage", "train")
            total = event["total"] if name != "train" else event["steps"]
            done = event["done"] if name != "train" else event["step"]
            if stage != name:
                if bar is not None:
                    bar.close()
                before = max(0, done - 1)  # what was done in an earlier sitting says nothing of the pace
                bar, stage = tqdm(total=total, initial=before, desc=name, file=sys.stderr, mininterval=0.5), name
            bar.update(done - bar.n)
            if name == "train":
                bar.set_postfix_str(f"loss {event['loss']:.3f}", refresh=False)
        if line := describe(event):
            tqdm.write(line, file=sys.stderr)

    try:
        return finish(events, hear)
    finally:
        if bar is not None:
            bar.close()


def tell(event: Event) -> str | None:
    """What a person wants to know of an event of a repair."""
    kind = event["type"]
    if kind == "join":
        lines = [f"{o['name']}: {o['source']} ({o['reason']})" for o in event["tensors"]]
        lines += [f"assumed: {sentence}" for sentence in event["assumptions"]]
        return "\n".join(lines + event["notes"])
    if kind == "dataset":
        broken = [f"{path} ({reason})" for path, reason in event["broken"]]
        garbled = [f"{path} ({reason})" for path, reason in event.get("garbled", ())]
        left_out = {"not found": event["missing"], "without captions": event["uncaptioned"], "broken": broken}
        left_out |= {"caption files that can't be read": garbled}
        counts = f"{event['training pictures']} pictures to train on, {event['held-out pictures']} held out"
        visits = event.get("visits of pictures in an epoch", event["training pictures"])
        counts += f"; an epoch visits them {visits} times" if visits != event["training pictures"] else ""
        listed = "".join(
            f"\n{name}: {len(rows)}: {printable(', '.join(rows[:5]))}{MORE if len(rows) > 5 else ''}"
            for name, rows in left_out.items()
            if rows
        )
        count = event["captions cut to the context length"]
        places = {at: event.get(f"captions cut at a {at}") for at in ("sentence", "comma", "token")}
        at = ", ".join(f"{number} at a {place}" for place, number in places.items() if number)
        cut = f"\n{count} captions are too long and were cut" + (f": {at}" if at else "") if count else ""
        copies = {one: event.get(f"{one} that equal another") for one in ("training pictures", "training captions")}
        equal = [f"{count} {one}" for one, count in copies.items() if count]
        alike = f"\n{' and '.join(equal)} equal another, and are not its negatives" if equal else ""
        return counts + listed + cut + alike
    if kind == "resume":
        return f"going on at step {event['step']} of {event['steps']}"
    if kind == "measure":
        cosine = event["drift"].get("penultimate", {}).get("cosine")
        return (
            f"step {event['step']}: held-out recall@1 {event['recall_at_1_text_to_image']:.3f} text to image, "
            f"{event['recall_at_1_image_to_text']:.3f} image to text"
            + (f"; cosine to the original at penultimate {cosine:.3f}" if cosine is not None else "")
        )
    if kind == "alarm":
        return f"step {event['step']}: {event['advice']}" if event["raised"] else None
    if kind == "waiting":
        return f"waiting for {', '.join(event['ahead'])}; Ctrl-C gives up the place"
    if kind == "paused":
        return f"paused at step {event['step']}"
    if kind == "resumed":
        return f"going on at step {event['step']}"
    if kind == "done" and event.get("early"):
        return f"ended early at step {event['step']}: no measurement was better for as long as patience allows"
    if kind == "out_of_memory":
        return f"step {event['step'] + 1} did not fit into memory; from now on {event['batch']} pairs in one pass"
    return None


class Stop:
    """Ctrl-C, or SIGTERM, asks for a stop at the next step's boundary; a second one aborts.

    several: torchrun has started this process beside others. It passes every signal on, SIGTERM also when another one
    has died, and kills what does not end within half a minute: signals ask, however many come.
    """

    def __init__(self, several: bool = False) -> None:
        self.asked = False
        self._several = several
        self._signals = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send

    def __enter__(self) -> Callable[[], bool]:
        self._before = {number: signal.signal(number, self._interrupt) for number in self._signals}
        return lambda: self.asked

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _interrupt(self, number, frame) -> None:
        if self._several:
            self.asked = True
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more to abort", file=sys.stderr)
