// Runs: what the files of a training run say, looked at again and again while it trains.
import { ask, duration, h, short } from "./api.js";
import { chart, legend } from "./chart.js";

const EVERY = 3000; // milliseconds between two looks at a run
const FRAME = 600; // milliseconds of a frame of the film

export class RunsTab {
  constructor(studio) {
    this.studio = studio;
    this.choice = h("select", { "aria-label": "Run", onchange: () => this.#use(this.choice.value) });
    this.none = h("p", { class: "hint" }, "Open the page with a run folder, also while it trains: latentflow studio RUN");
    this.line = h("p", { class: "trouble", role: "alert", hidden: true });
    this.tiles = h("dl", { class: "tiles" });
    this.name = h("p", { class: "hint" });
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Steps of the run" });
    this.open = h("button", { type: "button", class: "main", onclick: () => this.#openNewest() }, "Open its newest model in Draw");
    this.losses = h("figure", { class: "plot" });
    this.times = h("figure", { class: "plot" });
    this.screen = h("img", { alt: "", class: "screen" });
    this.film = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Preview by step", oninput: () => this.#frame() });
    this.play = h("button", { type: "button", class: "small", onclick: () => this.#roll() }, "Play");
    this.title = h("span", { class: "hint", role: "status" });
    this.previews = h("figure", { class: "plot film", hidden: true }, h("figcaption", {}, "Previews by step, always of the same seeds"), this.screen, h("div", { class: "row" }, this.play, this.film, this.title));
    this.view = h("div", { class: "run", hidden: true }, this.choice, this.name, this.line, this.bar, this.tiles, h("div", {}, this.open), h("div", { class: "plots" }, this.losses, this.times), this.previews);
    this.root = h("div", {}, this.none, this.view);
  }

  setState({ runs }) {
    this.none.hidden = runs.length > 0;
    this.view.hidden = !runs.length;
    this.choice.replaceChildren(...runs.map((run) => h("option", { value: run }, run)));
    this.choice.hidden = runs.length < 2;
    if (runs.length) this.#use(runs[0]);
  }

  shown() {
    if (this.run) this.#look();
  }

  #use(run) {
    this.run = run;
    this.steps = [];
    clearTimeout(this.timer);
    this.#look();
  }

  get isShown() {
    return !this.root.parentElement?.hidden && !document.hidden;
  }

  async #look() {
    clearTimeout(this.timer);
    const run = this.run;
    if (this.isShown) {
      try {
        const found = await ask(`/page/run?key=${encodeURIComponent(run)}`);
        if (run !== this.run) return;
        this.line.hidden = true;
        this.#show(found);
      } catch (error) {
        this.line.hidden = false;
        this.line.textContent = error.message;
      }
    }
    this.timer = setTimeout(() => this.#look(), EVERY);
  }

  #show(found) {
    const { step, steps } = found;
    this.bar.value = steps ? step / steps : 0;
    this.name.textContent = [found.name, found.description].filter(Boolean).join(": ");
    const loss = found.loss.at(-1)?.[1], heldOut = found.held_out.at(-1)?.[1];
    const rows = {
      state: found.state,
      step: steps ? `${step.toLocaleString("en")} / ${steps.toLocaleString("en")}` : short(step),
      loss: short(loss),
      ...(heldOut === undefined ? {} : { "held-out loss": short(heldOut) }),
      "images per second": short(found.images_per_second && Math.round(found.images_per_second * 10) / 10),
      "time left": found.seconds_left === null || found.state === "finished" ? "-" : `about ${duration(found.seconds_left)}`,
      "main memory": found.memory ? `${(found.memory / 2 ** 30).toFixed(2)} GiB` : "-",
      device: found.device || "-",
    };
    this.tiles.replaceChildren(...Object.entries(rows).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    this.open.disabled = !found.newest;
    this.newest = found.newest;
    const curves = [{ name: "loss", points: found.loss }];
    if (found.held_out.length) curves.push({ name: "held-out loss", points: found.held_out });
    const narrow = this.root.clientWidth < 560 ? 360 : 560;
    this.losses.replaceChildren(h("figcaption", {}, "Loss"), chart(curves, { across: "step", up: "loss", width: narrow }), legend(curves));
    const bins = found.by_time.map((one) => ({ name: `step ${one.step.toLocaleString("en")}`, points: one.points }));
    this.times.hidden = !bins.length;
    this.times.replaceChildren(h("figcaption", {}, "Loss by time: 0 is the image, 1 is noise"), chart(bins, { across: "time", up: "loss", width: narrow }), legend(bins));
    this.#newPreviews(found.previews);
  }

  #newPreviews(steps) {
    const atEnd = Number(this.film.value) >= this.steps.length - 1;
    const changed = steps.length !== this.steps.length;
    this.steps = steps;
    this.previews.hidden = !steps.length;
    this.film.max = Math.max(steps.length - 1, 0);
    if (changed && atEnd) this.film.value = this.film.max;
    if (changed) this.#frame();
  }

  #frame() {
    const step = this.steps[this.film.value];
    if (step === undefined) return;
    this.screen.src = `/page/run/preview?key=${encodeURIComponent(this.run)}&step=${step}`;
    this.screen.alt = this.title.textContent = `step ${step.toLocaleString("en")}`;
  }

  /** Show the previews one after another, from the first. */
  #roll() {
    if (this.rolling) {
      clearInterval(this.rolling);
      this.rolling = null;
      this.play.textContent = "Play";
      return;
    }
    this.film.value = 0;
    this.#frame();
    this.play.textContent = "Stop";
    this.rolling = setInterval(() => {
      if (Number(this.film.value) >= this.steps.length - 1) return this.#roll();
      this.film.value = Number(this.film.value) + 1;
      this.#frame();
    }, FRAME);
  }

  async #openNewest() {
    this.studio.state = await ask("/page/state");
    this.studio.fillModels();
    for (const tab of Object.values(this.studio.tabs)) if (tab !== this) tab.setState?.(this.studio.state);
    if (await this.studio.use(this.newest)) this.studio.show("draw");
  }
}
