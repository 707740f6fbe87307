// Controls made from what the server says of a model; they read as the fields of a request, and can be set from one.
import { h } from "./api.js";

let number = 0;

/** A label above a control, with a hint below. */
export function field(label, control, hint = "") {
  const id = (control.id ||= `control-${++number}`);
  const about = hint ? h("small", { id: `${id}-hint` }, hint) : null;
  if (about) control.setAttribute("aria-describedby", about.id);
  return h("div", { class: "field" }, h("label", { for: id }, label), control, about);
}

const numberInput = (given) => h("input", { type: "number", ...given });
const numeric = (input) => (input.value.trim() === "" ? null : Number(input.value));

/** Names to choose several of; with many, a box to search in. `none`: what an explicit "none" is called. */
export class Chips {
  constructor(label, names, { none = "", hint = "", most = Infinity, allowed = null } = {}) {
    this.names = names;
    this.boxes = names.map((name, index) => {
      const box = h("input", { type: "checkbox", onchange: () => this.#picked(box), disabled: allowed ? !allowed.has(index) : false });
      return box;
    });
    this.none = none ? h("input", { type: "checkbox", onchange: () => this.none.checked && this.boxes.forEach((box) => (box.checked = false)) }) : null;
    this.most = most;
    this.order = [];
    const chips = names.map((name, index) => h("label", { class: "chip", title: name }, this.boxes[index], h("span", {}, name)));
    if (this.none) chips.unshift(h("label", { class: "chip none" }, this.none, h("span", {}, none)));
    const list = h("div", { class: "chips" }, chips);
    const search = names.length > 16 && h("input", {
      type: "search", placeholder: `search ${names.length} names`, "aria-label": `Search ${label}`,
      oninput: (event) => {
        const wanted = event.target.value.toLowerCase();
        names.forEach((name, index) => { chips[index + (this.none ? 1 : 0)].hidden = !name.toLowerCase().includes(wanted) && !this.boxes[index].checked; });
      },
    });
    this.root = h("fieldset", { class: "field" }, h("legend", {}, label), search || null, list, hint && h("small", {}, hint));
  }

  #picked(box) {
    const index = this.boxes.indexOf(box);
    this.order = this.order.filter((one) => one !== index);
    if (box.checked) this.order.push(index);
    while (this.order.length > this.most) this.boxes[this.order.shift()].checked = false;
    if (this.none && box.checked) this.none.checked = false;
  }

  /** Indices in the order of their choice; [] for "none"; null where nothing is chosen. */
  get indices() {
    if (this.none?.checked) return [];
    return this.order.length ? [...this.order] : null;
  }

  set indices(chosen) {
    this.order = (chosen || []).filter((index) => this.boxes[index]);
    this.boxes.forEach((box, index) => (box.checked = this.order.includes(index)));
    if (this.none) this.none.checked = chosen !== null && chosen !== undefined && chosen.length === 0;
  }
}

/** The class and the named conditions of a model. */
export class Conditions {
  constructor(model, { bySeed = true, most = Infinity } = {}) {
    this.model = model;
    this.columns = new Map();
    const parts = [];
    if (model.class_names.length) {
      const without = model.required.includes("label") || !bySeed ? "" : "no class";
      const hint = bySeed ? "Nothing chosen: each seed has a class of its own." : "Nothing chosen: no class.";
      const allowed = model.seen_classes.length < model.class_names.length ? new Set(model.seen_classes) : null;
      this.classes = new Chips("Class", model.class_names, { none: without, hint, most, allowed });
      parts.push(this.classes.root);
    }
    for (const column of model.columns) parts.push(this.#column(column, most));
    this.root = h("div", { class: "conditions" }, parts);
  }

  #column(column, most) {
    const optional = column.required ? "" : "Empty: not given.";
    if (column.kind === "number") {
      const range = column.low === null ? "" : `Trained on ${column.low} to ${column.high}. `;
      const input = h("input", { type: "text", inputmode: "decimal", autocomplete: "off", placeholder: column.low === null ? "" : String(Number(column.mean.toPrecision(3))) });
      this.columns.set(column.name, { read: () => input.value.trim() || null, write: (value) => (input.value = value === null ? "" : [value].flat().join(", ")) });
      return field(column.name, input, `${range}${most > 1 ? "Several, like 20, 40, are taken in turn. " : ""}${optional}`);
    }
    if (column.kind === "labels") {
      const chips = new Chips(column.name, column.class_names, { none: "none of them", hint: "Nothing chosen: not given." });
      this.columns.set(column.name, {
        read: () => (chips.indices === null ? null : [chips.indices.map((index) => column.class_names[index])]),
        write: (value) => (chips.indices = value === null ? null : value.flat().map((name) => column.class_names.indexOf(name))),
      });
      return chips.root;
    }
    const chips = new Chips(column.name, column.class_names, { hint: "Nothing chosen: not given.", most });
    this.columns.set(column.name, {
      read: () => chips.indices && chips.indices.map((index) => column.class_names[index]),
      write: (value) => (chips.indices = value === null ? null : [value].flat().map((name) => column.class_names.indexOf(name))),
    });
    return chips.root;
  }

  read() {
    const found = {};
    if (this.classes?.indices) found.classes = this.classes.indices;
    const conditions = {};
    for (const [name, column] of this.columns) {
      const value = column.read();
      if (value !== null) conditions[name] = value;
    }
    return Object.keys(conditions).length ? { ...found, conditions } : found;
  }

  write(request) {
    if (this.classes) this.classes.indices = request.classes === undefined ? null : request.classes;
    for (const [name, column] of this.columns) column.write(request.conditions?.[name] ?? null);
  }
}

/** Seed, its lock, and the number of images. */
export class Seeds {
  constructor({ num = 8, most = 10000, label = "Images" } = {}) {
    this.seed = numberInput({ min: 0, step: 1, value: 0 });
    this.num = numberInput({ min: 1, max: most, step: 1, value: num });
    this.lock = h("input", { type: "checkbox", checked: true });
    const dice = h("button", { type: "button", class: "small", title: "Another seed", onclick: () => { this.seed.value = Math.floor(Math.random() * 1e6); this.seed.dispatchEvent(new Event("input", { bubbles: true })); } }, "Random");
    const lock = h("label", { class: "inline", title: "Locked: the next drawing has the same seeds" }, this.lock, "locked");
    this.root = h("div", { class: "pair" },
      h("div", { class: "field" }, h("label", { for: (this.seed.id = `control-${++number}`) }, "Seed"), h("div", { class: "row" }, this.seed, dice), lock),
      field(label, this.num));
  }

  read() {
    return { seed: numeric(this.seed) ?? 0, num: numeric(this.num) ?? 1 };
  }

  write(request) {
    if (request.seed !== undefined) this.seed.value = request.seed;
    if (request.num !== undefined) this.num.value = request.num;
  }

  /** After a drawing: unlocked seeds move on. */
  moveOn() {
    if (!this.lock.checked) this.seed.value = Number(this.seed.value) + Number(this.num.value);
  }
}

/** Guidance, solver and steps, beginning with the model's preset. */
export class Sampling {
  constructor(model, { guidance = true } = {}) {
    this.model = model;
    const preset = model.preset;
    const parts = [];
    this.guided = guidance && (model.can_guide.length > 0 || preset.guide);
    this.scale = numberInput({ min: 0, max: 1000, step: 0.1, value: preset.guidance });
    const slider = h("input", { type: "range", min: 1, max: 6, step: 0.1, value: preset.guidance, "aria-label": "Guidance scale", oninput: () => (this.scale.value = slider.value) });
    this.scale.addEventListener("input", () => (slider.value = this.scale.value));
    this.slider = slider;
    [this.from, this.until] = preset.guidance_interval.map((time) => numberInput({ min: 0, max: 1, step: 0.05, value: time }));
    this.from.setAttribute("aria-label", "Guidance from time");
    this.until.setAttribute("aria-label", "Guidance to time");
    this.by = new Chips("Guide on", model.can_guide, { hint: "Nothing chosen: all that is given." });
    this.by.indices = preset.guided_by && preset.guided_by.map((name) => model.can_guide.indexOf(name));
    this.channels = numberInput({ min: 1, step: 1, value: preset.guided_channels ?? "" });
    this.guide = h("input", { type: "text", placeholder: "none", value: preset.guide?.model ?? "", autocomplete: "off" });
    this.guide.addEventListener("input", () => (this.recorded = null)); // typed: whatever weights it has now
    if (this.guided) {
      const row = h("div", { class: "row" }, slider, this.scale);
      parts.push(h("div", { class: "field" }, h("label", { for: (this.scale.id = `control-${++number}`) }, "Guidance"), row, h("small", {}, "1 is off.")));
      parts.push(h("div", { class: "field" }, h("span", { class: "label" }, "Guidance acts from time"), h("div", { class: "row" }, this.from, h("span", {}, "to"), this.until), h("small", {}, "1 is noise, 0 is the picture.")));
    }
    this.solver = h("select", {}, model.solvers.map((name) => h("option", { value: name, selected: name === preset.solver }, name)));
    this.steps = numberInput({ min: 1, max: 10000, step: 1, value: preset.steps });
    this.tolerance = numberInput({ min: 1e-9, max: 1, step: "any", value: preset.rtol });
    this.shift = numberInput({ min: 0.0001, step: "any", value: preset.shift });
    const steps = field("Steps", this.steps), tolerance = field("Tolerance", this.tolerance), shift = field("Time shift", this.shift, "1: even steps.");
    this.swap = () => {
      const adaptive = model.adaptive.includes(this.solver.value), fitted = this.solver.value.startsWith("fitted");
      steps.hidden = adaptive || fitted;
      shift.hidden = adaptive || fitted;
      tolerance.hidden = !adaptive;
    };
    this.solver.addEventListener("change", this.swap);
    this.swap();
    parts.push(h("div", { class: "pair" }, field("Solver", this.solver), steps, tolerance));
    const more = [shift];
    if (this.guided) {
      if (model.can_guide.length > 1) more.push(this.by.root);
      more.push(field("Guide only the first channels", this.channels, "Empty: all latent channels."));
      more.push(field("Guide away from the model", this.guide, "A snapshot such as @1/8 or RUN@1000; none: the null condition."));
    }
    parts.push(h("details", {}, h("summary", {}, "More settings"), h("div", { class: "stack" }, more)));
    this.root = h("div", { class: "stack" }, parts);
  }

  /** The fields that differ from the preset and have an effect. */
  read() {
    const preset = this.model.preset, asked = {};
    const solver = this.solver.value, adaptive = this.model.adaptive.includes(solver), fitted = solver.startsWith("fitted");
    const take = (name, value, usual = preset[name]) => {
      if (value !== null && !Number.isNaN(value) && JSON.stringify(value) !== JSON.stringify(usual)) asked[name] = value;
    };
    if (this.guided) {
      take("guidance", numeric(this.scale));
      if (numeric(this.scale) !== 1) {
        take("guidance_interval", [numeric(this.from) ?? 0, numeric(this.until) ?? 1]);
        if (this.by.indices?.length) take("guided_by", this.by.indices.map((index) => this.model.can_guide[index]));
        take("guided_channels", numeric(this.channels));
        take("guide", this.#guideAsked() || (preset.guide ? "none" : null), preset.guide?.model ?? null);
      }
    }
    take("solver", solver);
    if (!adaptive && !fitted) {
      take("steps", numeric(this.steps));
      take("shift", numeric(this.shift));
    }
    if (adaptive) {
      take("rtol", numeric(this.tolerance));
      take("atol", numeric(this.tolerance));
    }
    return asked;
  }

  /** The guide by its name; that of a restored picture with the hash of its weights, which the server compares. */
  #guideAsked() {
    const name = this.guide.value.trim(), own = this.model.preset.guide;
    if (!name || this.recorded?.model !== name) return name;
    return own?.model === name && own.weights === this.recorded.weights ? name : this.recorded;
  }

  write(request) {
    const values = { ...this.model.preset, ...request };
    this.scale.value = this.slider.value = values.guidance;
    [this.from.value, this.until.value] = values.guidance_interval;
    this.by.indices = values.guided_by && values.guided_by.map((name) => this.model.can_guide.indexOf(name)).filter((index) => index >= 0);
    this.channels.value = values.guided_channels ?? "";
    this.recorded = request.guide?.weights ? request.guide : null;
    this.guide.value = values.guide === "none" ? "" : values.guide?.model ?? values.guide ?? "";
    if (![...this.solver.options].some((option) => option.value === values.solver)) this.solver.append(h("option", { value: values.solver }, values.solver));
    this.solver.value = values.solver;
    this.steps.value = values.steps;
    this.tolerance.value = values.rtol;
    this.shift.value = values.shift;
    this.swap();
  }
}

/** What a drawing will cost, asked of the server whenever a control of `root` changes; refusals are shown there, too. */
export class Estimate {
  constructor(root, asked) {
    this.root = h("p", { class: "cost", role: "status" });
    this.asked = asked;
    this.looks = 0;
    let timer;
    this.refresh = (event, wait = 250) => {
      clearTimeout(timer);
      timer = setTimeout(() => this.#look(), wait);
    };
    root.addEventListener("input", this.refresh);
    root.addEventListener("change", this.refresh);
  }

  async #look() {
    const { ask, duration, short } = await import("./api.js");
    try {
      const { evaluations, seconds } = await ask("/page/estimate", { json: this.asked() });
      const time = seconds === null ? "" : `, about ${duration(seconds)} in all`;
      this.root.textContent = `${short(evaluations)} evaluations per image${time}`;
      this.root.classList.remove("refused");
      if (seconds === null && this.looks++ < 10) this.refresh(null, 1000); // the speed of a new model is being measured
    } catch (error) {
      this.root.textContent = error.message;
      this.root.classList.add("refused");
    }
  }
}
