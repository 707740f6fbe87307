// Paint a map: regions of the model's map classes, from which images are drawn.
import { h, upload } from "./api.js";
import { Conditions, Estimate, Sampling, Seeds, field } from "./controls.js";
import { Gallery, pathOf } from "./gallery.js";
import { Strip, draw } from "./jobs.js";
import { Surface, filePlace, pixelsOf } from "./surface.js";

const UNLABELLED = 255;

export class PaintTab {
  constructor(studio) {
    this.studio = studio;
    this.surface = new Surface({
      colour: (value) => this.colourOf(value), blank: UNLABELLED, tools: ["brush", "eraser", "bucket", "box", "lasso"], label: "The map",
    });
    this.palette = h("fieldset", { class: "palette" }, h("legend", {}, "Paint with"));
    this.opacity = h("input", { type: "range", min: 0, max: 100, value: 100, oninput: () => this.#overlay() });
    this.overlay = h("label", { class: "before-after", hidden: true }, h("span", {}, "result"), this.opacity, h("span", {}, "map"));
    this.load = filePlace(studio, "map", "Load a map");
    const save = h("button", { type: "button", class: "small", onclick: () => this.save() }, "Save the map");
    this.work = h("div", { class: "work" }, this.palette, this.surface.bar, this.surface.stage, this.overlay, h("div", { class: "below-stage" }, this.load, save));
    this.none = h("p", { class: "hint", hidden: true }, "This model was not trained with semantic maps. Choose one that was: its map classes become brushes here.");
    this.gallery = new Gallery({ label: "Pictures of the map" });
    this.strip = new Strip();
    this.form = h("form", { class: "controls", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } });
    this.split = h("div", { class: "split canvas" }, this.form, h("div", { class: "results first" }, this.work), h("div", { class: "results" }, this.strip.root, this.gallery.root));
    this.root = h("div", {}, this.none, this.split);
  }

  setModel(model) {
    const before = JSON.stringify([this.model?.map, this.model?.image_size]);
    this.model = model;
    this.none.hidden = Boolean(model.map);
    this.split.hidden = !model.map;
    if (!model.map) return;
    this.conditions = new Conditions(model, { bySeed: false });
    this.seeds = new Seeds({ num: 4, most: 256 });
    this.native = h("input", { type: "checkbox" });
    this.sampling = new Sampling(model);
    this.estimate = new Estimate(this.form, () => this.asked());
    this.form.replaceChildren(this.conditions.root, this.seeds.root,
      h("label", { class: "inline", title: "Not the middle of the map at the size of the training images" }, this.native, "at the map's own size"),
      this.sampling.root, h("div", { class: "go" }, h("button", { class: "main" }, "Draw"), this.estimate.root));
    if (before !== JSON.stringify([model.map, model.image_size])) this.#begin();
    this.estimate.refresh();
  }

  #begin() {
    const { names, palette } = this.model.map;
    const brushes = names.map((name, index) => {
      const radio = h("input", { type: "radio", name: "map-class", value: index, checked: index === 0, onchange: () => this.#take(index) });
      const swatch = h("i", { class: "swatch" });
      swatch.style.background = `rgb(${palette[index].join()})`;
      return h("label", { title: name }, radio, swatch, h("span", {}, name));
    });
    const search = names.length > 16 && h("input", {
      type: "search", placeholder: `search ${names.length} classes`, "aria-label": "Search map classes",
      oninput: (event) => brushes.forEach((brush, index) => (brush.hidden = !names[index].toLowerCase().includes(event.target.value.toLowerCase()))),
    });
    this.palette.replaceChildren(h("legend", {}, "Paint with"), search || "", h("div", { class: "brushes" }, brushes));
    const [height, width] = this.model.image_size;
    this.surface.open(width, height, new Uint8Array(width * height)); // all of the first class
    this.#take(Math.min(1, names.length - 1));
    brushes[this.surface.value].querySelector("input").checked = true;
    this.overlay.hidden = true;
    this.surface.below.removeAttribute("src");
    this.gallery.begin(0);
    this.gallery.say("Choose a class, paint its regions, then press Draw.");
  }

  #take(index) {
    this.surface.value = index;
    if (this.surface.tool === "eraser") this.surface.choose("brush");
  }

  colourOf(value) {
    const { palette, unlabelled } = this.model.map;
    return [...(palette[value] || unlabelled), 255];
  }

  #overlay() {
    this.surface.canvas.style.opacity = this.opacity.value / 100;
  }

  asked() {
    const request = { ...this.conditions.read(), ...this.seeds.read(), ...this.sampling.read() };
    if (this.native.checked) request.native = true;
    return { model: this.model.key, task: "mask-to-image", request };
  }

  restore(request) {
    if (!this.model.map) return;
    this.conditions.write(request);
    this.seeds.write(request);
    this.sampling.write(request);
    this.estimate.refresh();
  }

  async take(file) {
    await this.takeUpload(await upload(file, file.name));
  }

  /** A map of a file, read by the rules of the command line: colours of classes, or their indices. */
  async takeUpload(found) {
    if (!this.model.map) return;
    const { data, width, height } = await pixelsOf(`/page/uploads/${found.id}/map?model=${encodeURIComponent(this.model.key)}`);
    const { palette } = this.model.map;
    const table = new Map(palette.map((colour, index) => [colour.join(), index]));
    const values = Uint8Array.from({ length: width * height }, (_, place) => table.get(data.slice(4 * place, 4 * place + 3).join()) ?? UNLABELLED);
    this.surface.open(width, height, values);
    this.surface.below.removeAttribute("src");
    this.overlay.hidden = true;
    this.surface.canvas.style.opacity = 1;
  }

  async save() {
    const url = URL.createObjectURL(await this.surface.png());
    const link = h("a", { href: url, download: "map.png" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  async draw() {
    const map = await upload(await this.surface.png(), "map.png");
    const state = await draw({ ...this.asked(), files: { map: map.id } }, this.strip, {
      onBegin: (job) => this.gallery.begin(job.total, job.size),
      onPicture: (picture) => {
        this.gallery.add(picture);
        if (this.gallery.pictures.length === 1) this.#show(picture);
      },
    });
    if (state) this.gallery.end();
    this.seeds.moveOn();
    this.estimate.refresh();
  }

  /** The first result below the map; where the map was cropped to its middle, they do not lie on each other. */
  #show(picture) {
    const [height, width] = this.model.image_size;
    const same = this.native.checked || Math.abs(this.surface.width * height - this.surface.height * width) < Math.max(width, height);
    this.overlay.hidden = !same;
    if (!same) return;
    this.surface.below.src = pathOf(picture);
    this.opacity.value = 35;
    this.#overlay();
    this.surface.over.addEventListener("pointerdown", () => { this.opacity.value = 100; this.#overlay(); }, { once: true });
  }
}
