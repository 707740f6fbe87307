// Edit: from an image to its variants, from one seed or class to another, and from an image to its noise.
import { h, short, upload } from "./api.js";
import { Chips, Conditions, Estimate, Sampling, Seeds, field } from "./controls.js";
import { Gallery } from "./gallery.js";
import { Strip, draw } from "./jobs.js";
import { filePlace } from "./surface.js";

const MODES = {
  "image-to-image": "Redraw an image",
  interpolate: "Between two seeds or classes",
  invert: "Invert an image",
  translate: "Draw from a paired image",
};

export class EditTab {
  constructor(studio) {
    this.studio = studio;
    this.mode = "image-to-image";
    this.modes = h("div", { class: "modes", role: "radiogroup", "aria-label": "What to do" });
    this.place = filePlace(studio, "image", "Drop an image here, or choose one");
    this.again = filePlace(studio, "image", "Another image");
    this.preview = h("img", { class: "input", alt: "" });
    this.inputName = h("figcaption", {});
    this.given = h("figure", { class: "given", hidden: true }, this.preview, this.inputName, this.again);
    this.gallery = new Gallery({ label: "Edited pictures" });
    this.strip = new Strip();
    this.film = h("input", { type: "range", min: 0, max: 1, value: 0, "aria-label": "Frame", oninput: () => this.#frame() });
    this.screen = h("img", { class: "screen", alt: "" });
    this.title = h("figcaption", { class: "hint" });
    this.cinema = h("figure", { class: "cinema", hidden: true }, this.screen, this.film, this.title);
    this.numbers = h("dl", { class: "numbers", hidden: true });
    this.form = h("form", { class: "controls", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } });
    this.root = h("div", { class: "split" }, this.form,
      h("div", { class: "results" }, this.place, this.given, this.strip.root, this.cinema, this.gallery.root, this.numbers));
  }

  setModel(model) {
    this.model = model;
    const offered = Object.entries(MODES).filter(([mode]) => mode !== "translate" || model.takes_input);
    if (!offered.some(([mode]) => mode === this.mode)) this.mode = "image-to-image";
    this.modes.replaceChildren(...offered.map(([mode, words]) => h("label", {}, h("input", { type: "radio", name: "edit-mode", value: mode, checked: mode === this.mode, onchange: () => this.#choose(mode) }), h("span", {}, words))));
    this.#choose(this.mode);
  }

  /** The controls of one way to edit. */
  #choose(mode) {
    const { model } = this;
    this.mode = mode;
    for (const radio of this.modes.querySelectorAll("input")) radio.checked = radio.value === mode;
    const between = mode === "interpolate", single = mode === "invert";
    this.conditions = new Conditions(model, { bySeed: between, most: between ? 2 : single ? 1 : Infinity });
    this.seeds = new Seeds({ num: 4, most: 256 });
    this.sampling = new Sampling(model, { guidance: !single });
    this.estimate = new Estimate(this.form, () => this.asked());
    const parts = [this.modes, this.conditions.root];
    if (mode === "image-to-image") {
      this.strength = h("input", { type: "number", min: 0.01, max: 1, step: 0.05, value: 0.6 });
      const slider = h("input", { type: "range", min: 0.05, max: 1, step: 0.05, value: 0.6, "aria-label": "Strength", oninput: () => (this.strength.value = slider.value) });
      this.strength.addEventListener("input", () => (slider.value = this.strength.value));
      const row = h("div", { class: "row" }, slider, this.strength);
      this.strength.setAttribute("aria-label", "Strength as a number");
      parts.push(h("div", { class: "field" }, h("span", { class: "label" }, "Strength"), row, h("small", {}, "Near 0 little changes; 1 leaves nothing of the image.")));
    }
    if (between) {
      [this.from, this.until] = [3, 8].map((value) => h("input", { type: "number", min: 0, step: 1, value }));
      this.frames = h("input", { type: "number", min: 2, max: 200, step: 1, value: 9 });
      parts.push(h("div", { class: "pair" }, field("From seed", this.from), field("To seed", this.until)), field("Frames", this.frames, "Of two classes one is where it begins, the other where it ends."));
    } else if (!single) parts.push(this.seeds.root);
    if (single) this.sampling.write({ ...model.preset, ...model.inversion });
    this.form.replaceChildren(...parts, this.sampling.root,
      h("div", { class: "go" }, h("button", { class: "main" }, single ? "Invert" : "Draw"), this.estimate.root));
    this.place.hidden = between || Boolean(this.input);
    this.given.hidden = between || !this.input;
    this.cinema.hidden = this.numbers.hidden = true;
    this.estimate.refresh();
  }

  asked() {
    const request = { ...this.conditions.read(), ...this.sampling.read() };
    if (this.mode === "interpolate") Object.assign(request, { seeds: [Number(this.from.value), Number(this.until.value)], num: Number(this.frames.value) });
    else if (this.mode !== "invert") Object.assign(request, this.seeds.read());
    if (this.mode === "image-to-image") request.strength = Number(this.strength.value);
    return { model: this.model.key, task: this.mode, request };
  }

  restore(request, found) {
    this.#choose(found.task);
    this.conditions.write(request);
    this.sampling.write(request);
    if (found.task === "interpolate") {
      [this.from.value, this.until.value] = request.seeds;
      this.frames.value = request.num;
    } else this.seeds.write(request);
    if (request.strength) {
      this.strength.value = request.strength;
      this.strength.dispatchEvent(new Event("input", { bubbles: true }));
    }
    this.estimate.refresh();
  }

  async take(file) {
    await this.takeUpload(await upload(file, file.name));
  }

  async takeUpload(found) {
    this.input = found;
    this.preview.src = `/page/uploads/${found.id}/shown`;
    this.preview.alt = found.name;
    this.inputName.textContent = `${found.name}, ${found.width} x ${found.height}`;
    if (!this.model) return;
    if (this.mode === "interpolate") this.#choose("image-to-image");
    this.place.hidden = true;
    this.given.hidden = false;
  }

  async draw() {
    const asked = this.asked();
    if (this.mode !== "interpolate") {
      if (!this.input) return this.strip.trouble("give an image first: drop one on the page, or choose one");
      asked.files = { image: this.input.id };
    }
    this.cinema.hidden = this.numbers.hidden = true;
    let job;
    const state = await draw(asked, this.strip, {
      onBegin: (begun) => { job = begun; this.gallery.begin(begun.total, begun.size); },
      onPicture: (picture) => this.gallery.add(picture),
    });
    if (state) this.gallery.end();
    if (state?.state === "done" && asked.task === "interpolate") this.#roll();
    if (state?.state === "done" && asked.task === "invert") this.#inverted(state, job);
    if (state?.state === "done") this.seeds.moveOn();
    this.estimate.refresh();
  }

  /** The frames one after another under a slider. */
  #roll() {
    this.film.max = this.gallery.pictures.length - 1;
    this.film.value = 0;
    this.cinema.hidden = false;
    this.#frame();
  }

  #frame() {
    const picture = this.gallery.pictures[this.film.value];
    if (!picture) return;
    this.screen.src = `/page/jobs/${picture.job}/${picture.row}/shown`;
    this.screen.alt = this.title.textContent = picture.caption;
  }

  /** What the round trip lost, and the image drawn from its noise with another class. */
  #inverted(state, job) {
    const rows = Object.entries(state.numbers).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, short(value))]);
    const again = this.model.class_names.length > 0 && this.#otherClass(job);
    this.numbers.replaceChildren(...rows, ...(again ? [h("dt", {}, "draw its noise as"), h("dd", {}, again)] : []));
    this.numbers.hidden = false;
  }

  #otherClass(job) {
    const chips = new Chips("Class", this.model.class_names, { most: 1 });
    const go = h("button", { type: "button", class: "small", onclick: async () => {
      const asked = { model: this.model.key, task: "sample", request: { ...this.sampling.read(), num: 1, guidance: 1, classes: chips.indices || [] }, files: { noise: job.id } };
      const state = await draw(asked, this.strip, { onPicture: (picture) => {
        this.gallery.places.push(h("figure", { class: "tile waiting" }));
        this.gallery.root.append(this.gallery.places.at(-1));
        this.gallery.add(picture);
      } });
      if (state) this.gallery.end();
    } }, "Draw");
    return h("div", { class: "stack" }, chips.root, h("div", {}, go));
  }
}
