// Compare: the same seeds by two to four models, snapshots, guides or solvers, with time and evaluations under each.
import { ask, duration, h, short } from "./api.js";
import { Conditions, Sampling, Seeds } from "./controls.js";
import { Gallery } from "./gallery.js";
import { Strip, draw } from "./jobs.js";

const MOST = 4;

/** One of those that are compared: a model and how it draws. */
class Side {
  constructor(studio, onGone) {
    this.studio = studio;
    this.choice = h("select", { "aria-label": "Model of this row", onchange: () => this.use(this.choice.value) });
    this.settings = h("div", {});
    this.strip = new Strip();
    this.gallery = new Gallery({ label: "Pictures of this row" });
    this.cost = h("p", { class: "cost", role: "status" });
    this.gone = h("button", { type: "button", class: "small", onclick: () => onGone(this), title: "Compare without this row" }, "Remove");
    this.controls = h("details", {}, h("summary", {}, "Solver and guidance"), this.settings);
    this.root = h("section", { class: "side" }, h("div", { class: "row" }, this.choice, this.gone), this.controls, this.strip.root, this.gallery.root, this.cost);
  }

  fill() {
    const chosen = this.choice.value;
    this.choice.replaceChildren(...this.studio.state.models.map(({ key, name }) => h("option", { value: key }, name)));
    this.choice.value = chosen || this.studio.state.models[0]?.key;
  }

  async use(key) {
    this.choice.value = key;
    try {
      this.model = await ask(`/page/model?key=${encodeURIComponent(key)}`);
    } catch (error) {
      this.model = null;
      return this.strip.trouble(error.message);
    }
    this.strip.trouble("");
    this.sampling = new Sampling(this.model);
    this.settings.replaceChildren(this.sampling.root);
  }

  async draw(common) {
    if (!this.model) return;
    this.cost.textContent = "";
    this.gallery.begin(0);
    const asked = { model: this.model.key, task: "sample", request: { ...common, ...this.sampling.read() } };
    const state = await draw(asked, this.strip, {
      onBegin: (job) => this.gallery.begin(job.total, job.size),
      onPicture: (picture) => this.gallery.add(picture),
    });
    if (!state) return;
    this.gallery.end();
    if (state.state === "done") this.strip.words.textContent = "";
    if (state.done) this.cost.textContent = `${short(state.evaluations)} evaluations and ${duration(state.seconds / state.done)} per image`;
  }
}

export class CompareTab {
  constructor(studio) {
    this.studio = studio;
    this.sides = [];
    this.list = h("div", { class: "sides" });
    this.more = h("button", { type: "button", onclick: () => this.#add() }, "Add a row");
    this.form = h("form", { class: "controls", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } });
    this.root = h("div", { class: "split" }, this.form, h("div", { class: "results" }, this.list, h("div", {}, this.more)));
  }

  setModel(model) {
    this.model = model;
    this.conditions = new Conditions(model);
    this.seeds = new Seeds({ num: 6, most: 64 });
    this.form.replaceChildren(h("p", { class: "hint" }, "All rows draw the same seeds and conditions; each has its own model, solver and guidance."),
      this.conditions.root, this.seeds.root, h("div", { class: "go" }, h("button", { class: "main" }, "Draw all rows"),
        h("button", { type: "button", onclick: () => this.sides.forEach((side) => side.strip.current?.stop()) }, "Stop all")));
    if (!this.sides.length) {
      const other = this.studio.state.models[1]?.key;
      this.#add(model.key);
      this.#add(other && model.key !== other ? other : model.key);
    }
  }

  /** Which models there are changes while a run trains. */
  setState() {
    for (const side of this.sides) side.fill();
  }

  async #add(key = this.model.key) {
    const side = new Side(this.studio, (gone) => {
      this.sides = this.sides.filter((one) => one !== gone);
      gone.strip.current?.stop();
      gone.root.remove();
      this.more.hidden = false;
    });
    this.sides.push(side);
    this.list.append(side.root);
    this.more.hidden = this.sides.length >= MOST;
    side.fill();
    await side.use(key);
  }

  draw() {
    const common = { ...this.conditions.read(), ...this.seeds.read() };
    this.seeds.moveOn();
    return Promise.all(this.sides.map((side) => side.draw(common)));
  }
}
