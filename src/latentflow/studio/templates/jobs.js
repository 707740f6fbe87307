// A job: pictures that the server draws one after another. The strip shows its progress, stops it and shows its error.
import { ask, duration, h, short } from "./api.js";

const EVERY = 250; // milliseconds between two looks at a job

/** Progress, stop button and error of the jobs of one tab. */
export class Strip {
  constructor(label = "Draw") {
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.words = h("span", { class: "words", role: "status" });
    this.stop = h("button", { type: "button", class: "stop", hidden: true, onclick: () => this.current?.stop() }, "Stop");
    this.line = h("p", { class: "trouble", role: "alert", hidden: true });
    this.root = h("div", { class: "strip", "aria-label": label }, this.bar, this.words, this.stop, this.line);
    this.bar.hidden = true;
  }

  trouble(line) {
    this.line.hidden = !line;
    this.line.textContent = line || "";
  }

  show(state, words) {
    const busy = state.state === "waiting" || state.state === "drawing";
    this.bar.hidden = this.stop.hidden = !busy;
    if (state.state === "waiting" && !state.progress) this.bar.removeAttribute("value");
    else this.bar.value = state.progress || 0;
    this.words.textContent = words;
  }
}

function wordsOf(state) {
  const { done, total, seconds } = state;
  if (state.state === "waiting") return state.before ? `waiting for ${state.before} before` : "about to begin";
  if (state.state === "drawing") {
    const left = state.left === null ? "" : `, about ${duration(state.left)} left`;
    return `${done} of ${total}${left}`;
  }
  if (state.state === "stopped") return `stopped after ${done} of ${total}`;
  if (state.state === "done") {
    const calls = state.evaluations ? `, ${short(state.evaluations)} evaluations each` : "";
    return `${total} in ${duration(seconds)}${calls}`;
  }
  return "";
}

/**
 * Draw: `asked` is {model, task, request, files}. Calls onBegin(state) once it is accepted and onPicture(picture) for each
 * picture as it comes; returns the last state, or null where it was refused.
 */
export async function draw(asked, strip, { onBegin = () => {}, onPicture = () => {} } = {}) {
  if (strip.current) await strip.current.stop();
  strip.trouble("");
  let job;
  try {
    job = await ask("/page/jobs", { json: asked });
  } catch (error) {
    strip.trouble(error.message);
    return null;
  }
  const own = (strip.current = { id: job.id, stop: () => ask(`/page/jobs/${job.id}/stop`, { method: "POST" }).catch(() => {}) });
  onBegin(job);
  if (window.innerWidth < 720) strip.root.scrollIntoView({ block: "start", behavior: "smooth" });
  let seen = 0;
  try {
    for (;;) {
      const state = await ask(`/page/jobs/${job.id}?since=${seen}`);
      for (const picture of state.pictures) onPicture({ ...picture, job: job.id });
      seen += state.pictures.length;
      strip.show(state, wordsOf(state));
      if (!["waiting", "drawing"].includes(state.state)) {
        if (state.error) strip.trouble(state.error);
        return state;
      }
      await new Promise((go) => setTimeout(go, EVERY));
    }
  } catch (error) {
    strip.show({ state: "failed" }, "");
    strip.trouble(error.message);
    return null;
  } finally {
    if (strip.current === own) strip.current = null;
  }
}
