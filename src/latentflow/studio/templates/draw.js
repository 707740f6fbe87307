// Draw: images from seeds and conditions.
import { h } from "./api.js";
import { Conditions, Estimate, Sampling, Seeds } from "./controls.js";
import { Gallery } from "./gallery.js";
import { Strip, draw } from "./jobs.js";

export class DrawTab {
  constructor(studio) {
    this.studio = studio;
    this.gallery = new Gallery({ label: "Drawn pictures" });
    this.strip = new Strip();
    this.form = h("form", { class: "controls", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } });
    this.root = h("div", { class: "split" }, this.form, h("div", { class: "results" }, this.strip.root, this.gallery.root));
    this.gallery.say("Press Draw. Click a picture for its request; drop a picture of latentflow anywhere to restore its own.");
  }

  setModel(model) {
    this.model = model;
    this.conditions = new Conditions(model);
    this.seeds = new Seeds();
    this.sampling = new Sampling(model);
    this.size = h("select", {}, model.sizes.map(([height, width], index) => h("option", { value: index ? `${width}x${height}` : "" }, `${width} x ${height}`)));
    const size = model.sizes.length > 1 && h("div", { class: "field" }, h("label", {}, "Size in pixels ", this.size));
    this.estimate = new Estimate(this.form, () => this.asked());
    this.button = h("button", { class: "main" }, "Draw");
    this.form.replaceChildren(this.conditions.root, size || "", this.seeds.root, this.sampling.root, h("div", { class: "go" }, this.button, this.estimate.root));
    this.estimate.refresh();
  }

  asked() {
    const request = { ...this.conditions.read(), ...this.seeds.read(), ...this.sampling.read() };
    if (this.size.value) request.image_size = this.size.value;
    return { model: this.model.key, task: "sample", request };
  }

  restore(request) {
    this.conditions.write(request);
    this.seeds.write(request);
    this.seeds.lock.checked = true;
    this.sampling.write(request);
    this.size.value = request.image_size || "";
    this.estimate.refresh();
  }

  draw(asked = this.asked()) {
    return draw(asked, this.strip, {
      onBegin: (job) => this.gallery.begin(job.total, job.size),
      onPicture: (picture) => this.gallery.add(picture),
    }).then((state) => {
      if (state) this.gallery.end();
      if (state?.state === "done" && asked.task === "sample") this.seeds.moveOn();
      this.estimate.refresh();
    });
  }

  /** Pictures near one that was drawn, with its own settings. */
  vary(request) {
    return this.draw({ model: this.model.key, task: "vary", request });
  }
}
