// Fill: the hole of a photo, painted here or given as a mask. Every other pixel of the download is that of the photo.
import { ask, h, upload } from "./api.js";
import { Conditions, Estimate, Sampling, Seeds, field } from "./controls.js";
import { Gallery } from "./gallery.js";
import { Strip, draw } from "./jobs.js";
import { Surface, filePlace, pixelsOf } from "./surface.js";

const HOLE = [214, 40, 120, 150], SHOWN = [0, 0, 0, 0];

export class FillTab {
  constructor(studio) {
    this.studio = studio;
    this.surface = new Surface({
      colour: (value) => (value ? HOLE : SHOWN), blank: 0, tools: ["brush", "eraser", "box", "lasso"], label: "The hole to fill", onPainted: () => this.#painted(),
    });
    this.share = h("span", { class: "hint", role: "status" });
    this.readings = h("div", { class: "readings" });
    this.photoPlace = filePlace(studio, "photo", "Drop a photo of any size here, or choose one");
    this.maskPlace = filePlace(studio, "mask", "Use a painted mask");
    this.again = filePlace(studio, "photo", "Another photo");
    this.work = h("div", { class: "work", hidden: true }, this.surface.bar, this.surface.stage,
      h("div", { class: "below-stage" }, this.share, this.maskPlace, this.again), this.readings);
    this.gallery = new Gallery({ label: "Filled photos", wide: true });
    this.strip = new Strip();
    this.slide = h("input", { type: "range", min: 0, max: 100, value: 0, "aria-label": "Before and after", oninput: () => this.gallery.root.style.setProperty("--before", `${this.slide.value}%`) });
    this.compare = h("label", { class: "before-after", hidden: true }, h("span", {}, "after"), this.slide, h("span", {}, "before"));
    this.form = h("form", { class: "controls", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } });
    this.root = h("div", { class: "split canvas" }, this.form, h("div", { class: "results first" }, this.photoPlace, this.work),
      h("div", { class: "results" }, this.strip.root, this.compare, this.gallery.root));
  }

  setModel(model) {
    this.model = model;
    this.conditions = new Conditions(model, { bySeed: false });
    this.seeds = new Seeds({ num: 4, most: 64 });
    this.feather = h("input", { type: "number", min: 0, step: 1, value: 0 });
    this.fit = h("select", {}, [["", "as the hole needs"], ["window", "a window around the hole"], ["whole", "the whole photo"], ["native", "the photo at its own size"]].map(([value, words]) => h("option", { value }, words)));
    this.method = h("select", {}, h("option", { value: "" }, model.inpainting ? "as trained" : "known part re-imposed"), model.inpainting && h("option", { value: "replacement" }, "known part re-imposed"));
    this.sampling = new Sampling(model);
    this.estimate = new Estimate(this.form, () => ({ ...this.asked(), task: "inpaint" }));
    const more = h("details", {}, h("summary", {}, "How the photo is seen"), h("div", { class: "stack" },
      field("The model sees", this.fit), field("Method", this.method, model.inpainting ? "" : "This model was not trained for holes.")));
    this.form.replaceChildren(this.conditions.root, this.seeds.root,
      field("Feather", this.feather, "Pixels over which colours blend into the surroundings, inside the hole."), more, this.sampling.root,
      h("div", { class: "go" }, h("button", { class: "main" }, "Fill"), this.estimate.root));
    this.estimate.refresh();
  }

  asked() {
    const request = { ...this.conditions.read(), ...this.seeds.read(), ...this.sampling.read(), feather: Number(this.feather.value) || 0 };
    if (this.fit.value) request.fit = this.fit.value;
    if (this.method.value) request.method = this.method.value;
    return { model: this.model.key, task: "inpaint", request };
  }

  restore(request) {
    this.conditions.write(request);
    this.seeds.write(request);
    this.sampling.write(request);
    this.feather.value = request.feather || 0;
    this.method.value = this.model.inpainting && request.method === "replacement" ? "replacement" : "";
    this.estimate.refresh();
  }

  /** A file that was dropped on one of this tab's places. */
  async take(file, role) {
    const found = await upload(file, file.name);
    await (role === "mask" ? this.#readMask(found) : this.takeUpload(found));
  }

  /** A photo, as an upload. */
  async takeUpload(found) {
    this.photo = found;
    this.source = `/page/uploads/${found.id}/shown`;
    this.surface.below.src = this.source;
    this.surface.below.alt = found.name;
    this.surface.open(found.width, found.height);
    this.readings.replaceChildren();
    this.photoPlace.hidden = true;
    this.work.hidden = false;
    this.compare.hidden = true;
    this.gallery.begin(0);
    this.gallery.say("Paint over what is to be filled, then press Fill.");
  }

  /** A mask may mean several things: each is shown, and one is chosen. */
  async #readMask(found) {
    const readings = await ask(`/page/uploads/${found.id}/masks?photo=${this.photo.id}`);
    const choose = async (reading) => {
      const { data } = await pixelsOf(`/page/uploads/${reading.id}/shown`);
      this.surface.set(Uint8Array.from({ length: data.length / 4 }, (_, place) => (data[4 * place] > 127 ? 1 : 0)));
      this.readings.replaceChildren();
    };
    this.readings.replaceChildren(
      h("p", {}, `${found.name} is understood in one of these ways; white is filled. Choose one:`),
      h("div", { class: "cards" }, readings.map((reading) => h("button", { type: "button", class: "card", onclick: () => choose(reading) },
        h("img", { src: `/page/uploads/${reading.id}/shown`, alt: "" }), h("span", {}, reading.title), h("small", {}, `${percent(reading.share)} of the photo`)))));
    this.readings.scrollIntoView({ block: "nearest" });
  }

  #painted() {
    if (!this.surface.values) return;
    const share = this.surface.values.reduce((sum, value) => sum + value, 0) / this.surface.values.length;
    this.share.textContent = share ? `${percent(share)} of the photo is to be filled` : "nothing is painted yet";
  }

  async draw() {
    if (!this.photo) return this.strip.trouble("give a photo first: drop one on the page, or choose one");
    if (!this.surface.values.includes(1)) return this.strip.trouble("nothing is painted yet; paint over what is to be filled");
    const mask = await ask("/page/uploads/painted-mask", { method: "POST", body: await this.surface.png((value) => (value ? [255, 255, 255] : [0, 0, 0])) });
    this.slide.value = 0;
    this.gallery.root.style.setProperty("--before", "0%");
    const state = await draw({ ...this.asked(), files: { image: this.photo.id, mask: mask.id } }, this.strip, {
      onBegin: (job) => this.gallery.begin(job.total, [this.photo.width, this.photo.height]),
      onPicture: (picture) => {
        this.gallery.add(picture);
        this.compare.hidden = false;
        const button = this.gallery.places[this.gallery.pictures.length - 1].querySelector("button");
        button.append(h("img", { class: "before", src: this.source, alt: "" }));
      },
    });
    if (state) this.gallery.end();
    this.seeds.moveOn();
    this.estimate.refresh();
  }
}

const percent = (share) => `${share < 0.01 ? (100 * share).toPrecision(1) : Math.round(100 * share)} %`;
