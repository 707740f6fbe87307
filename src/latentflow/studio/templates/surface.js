// A picture of numbers to paint on: a mask of 0 and 1, or a map of class indices. Edges are hard: every pixel has one value.
import { h } from "./api.js";

const MOST_UNDO = 96 * 2 ** 20; // bytes
const TOOLS = { brush: "Brush", eraser: "Eraser", box: "Box", lasso: "Lasso", bucket: "Bucket" };

export class Surface {
  /**
   * colour(value) is [red, green, blue, alpha]; `blank` is the value that the eraser paints; `tools` are those offered.
   * onPainted is called after every change.
   */
  constructor({ colour, blank, tools, label, onPainted = () => {} }) {
    Object.assign(this, { colour, blank, onPainted });
    this.value = 1;
    this.tool = "brush";
    this.undone = [];
    this.done = [];
    this.below = h("img", { class: "below", alt: "", draggable: "false" });
    this.canvas = h("canvas", { class: "paint" });
    this.over = h("canvas", { class: "over", tabindex: 0, role: "application", "aria-label": `${label}. Arrow keys move the cursor, Space paints, Z undoes.` });
    this.stage = h("div", { class: "stage" }, this.below, this.canvas, this.over);
    this.size = h("input", { type: "range", min: 1, max: 100, value: 12, "aria-label": "Brush size" });
    this.size.addEventListener("input", () => this.#hover());
    this.bar = this.#toolbar(tools);
    this.#listen();
    new ResizeObserver(() => this.#hover()).observe(this.stage);
  }

  #toolbar(tools) {
    this.buttons = Object.fromEntries(tools.map((tool) => [tool, h("button", { type: "button", class: "small", "aria-pressed": String(tool === "brush"), onclick: () => this.choose(tool) }, TOOLS[tool])]));
    this.back = h("button", { type: "button", class: "small", onclick: () => this.undo(), disabled: true }, "Undo");
    this.forth = h("button", { type: "button", class: "small", onclick: () => this.redo(), disabled: true }, "Redo");
    const clear = h("button", { type: "button", class: "small", onclick: () => this.clear() }, "Clear");
    return h("div", { class: "toolbar", role: "toolbar", "aria-label": "Tools" }, Object.values(this.buttons), h("label", { class: "inline" }, "size", this.size), this.back, this.forth, clear);
  }

  choose(tool) {
    this.tool = tool;
    for (const [name, button] of Object.entries(this.buttons)) button.setAttribute("aria-pressed", name === tool);
    this.path = null;
    this.#hover();
  }

  /** A new picture of numbers, of `blank` or of `values`. */
  open(width, height, values = null) {
    Object.assign(this, { width, height, values: values || new Uint8Array(width * height).fill(this.blank), done: [], undone: [], path: null });
    this.cursor = [Math.floor(width / 2), Math.floor(height / 2)];
    this.canvas.width = width;
    this.canvas.height = height;
    this.stage.style.setProperty("--ratio", width / height);
    this.stage.classList.toggle("small", width < 400);
    this.size.max = Math.max(Math.round(Math.max(width, height) / 3), 4);
    this.size.value = Math.max(Math.round(Math.max(width, height) / 14), 1);
    this.#render();
    this.#changed();
  }

  /** Replace all numbers, as one step that can be undone. */
  set(values) {
    this.#remember();
    this.values = values;
    this.#render();
    this.#changed();
  }

  clear() {
    this.set(new Uint8Array(this.width * this.height).fill(this.blank));
  }

  undo() {
    this.#swap(this.done, this.undone);
  }

  redo() {
    this.#swap(this.undone, this.done);
  }

  #swap(from, to) {
    if (!from.length) return;
    to.push(this.values);
    this.values = from.pop();
    this.#render();
    this.#changed();
  }

  #remember() {
    this.done.push(this.values.slice());
    this.undone = [];
    while (this.done.length > 1 && this.done.length * this.values.length > MOST_UNDO) this.done.shift();
  }

  #changed() {
    this.back.disabled = !this.done.length;
    this.forth.disabled = !this.undone.length;
    this.onPainted();
  }

  /** The numbers as a PNG of their colours without opacity; `colour` in place of the surface's own. */
  async png(colour = this.colour) {
    const canvas = h("canvas", {});
    canvas.width = this.width;
    canvas.height = this.height;
    const image = new ImageData(this.width, this.height);
    this.#fillImage(image, 0, 0, this.width, this.height, (value) => [...colour(value).slice(0, 3), 255]);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  // Drawing on the screen

  #fillImage(image, left, top, width, height, colour) {
    const table = Array.from({ length: 256 }, (_, value) => colour(value));
    const data = image.data;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const [red, green, blue, alpha] = table[this.values[(top + y) * this.width + left + x]];
        const at = 4 * (y * width + x);
        data[at] = red;
        data[at + 1] = green;
        data[at + 2] = blue;
        data[at + 3] = alpha;
      }
    }
  }

  #render(left = 0, top = 0, right = this.width, bottom = this.height) {
    left = Math.max(Math.floor(left), 0);
    top = Math.max(Math.floor(top), 0);
    right = Math.min(Math.ceil(right), this.width);
    bottom = Math.min(Math.ceil(bottom), this.height);
    if (right <= left || bottom <= top) return;
    const image = new ImageData(right - left, bottom - top);
    this.#fillImage(image, left, top, right - left, bottom - top, this.colour);
    this.canvas.getContext("2d").putImageData(image, left, top);
  }

  repaint() {
    if (this.width) this.#render();
  }

  /** Brush outline, and the box or lasso that is being drawn. */
  #hover() {
    if (!this.width) return;
    const { clientWidth: width, clientHeight: height } = this.over;
    if (!width) return;
    const dense = window.devicePixelRatio || 1;
    this.over.width = width * dense;
    this.over.height = height * dense;
    const pen = this.over.getContext("2d");
    pen.scale((width * dense) / this.width, (height * dense) / this.height);
    const unit = this.width / width;
    const outline = () => {
      for (const [colour, wide] of [["#000", 3], ["#fff", 1.4]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = wide * unit;
        pen.stroke();
      }
    };
    pen.beginPath();
    if (this.path && this.tool === "box") {
      const [[x0, y0], [x1, y1]] = [this.path[0], this.path.at(-1)];
      pen.rect(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0));
      outline();
    } else if (this.path && this.tool === "lasso") {
      this.path.forEach(([x, y], place) => (place ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      outline();
    }
    if (!this.near) return;
    const [x, y] = this.cursor;
    pen.beginPath();
    if (this.tool === "brush" || this.tool === "eraser") pen.arc(x + 0.5, y + 0.5, this.radius + 0.5, 0, 7);
    else {
      pen.moveTo(x - 7 * unit, y);
      pen.lineTo(x + 7 * unit, y);
      pen.moveTo(x, y - 7 * unit);
      pen.lineTo(x, y + 7 * unit);
    }
    outline();
  }

  get radius() {
    return Math.max(Number(this.size.value), 1) / 2;
  }

  // Painting

  #listen() {
    const at = (event) => {
      const box = this.over.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * this.width, ((event.clientY - box.top) / box.height) * this.height];
    };
    const place = ([x, y]) => [Math.floor(Math.min(Math.max(x, 0), this.width - 1e-6)), Math.floor(Math.min(Math.max(y, 0), this.height - 1e-6))];
    this.over.addEventListener("pointerdown", (event) => {
      if (!this.width || event.button) return;
      event.preventDefault();
      this.over.focus({ preventScroll: true });
      this.over.setPointerCapture(event.pointerId);
      this.cursor = place(at(event));
      this.#press(this.tool === "box" || this.tool === "lasso" ? at(event) : this.cursor);
    });
    this.over.addEventListener("pointermove", (event) => {
      if (!this.width) return;
      const before = this.cursor;
      this.near = true;
      this.cursor = place(at(event));
      if (this.pressed) this.#drag(before, at(event));
      this.#hover();
    });
    for (const name of ["pointerup", "pointercancel"]) this.over.addEventListener(name, () => this.#release());
    this.over.addEventListener("pointerleave", () => { this.near = document.activeElement === this.over; this.#hover(); });
    this.over.addEventListener("focus", () => { this.near = true; this.#hover(); });
    this.over.addEventListener("blur", () => { this.near = false; this.#hover(); });
    this.over.addEventListener("keydown", (event) => this.#key(event));
  }

  #press(point) {
    if (this.tool === "bucket") return this.#bucket(this.cursor);
    this.pressed = true;
    if (this.tool === "box" || this.tool === "lasso") {
      this.path = [point];
      return;
    }
    this.#remember();
    this.#stroke(this.cursor, this.cursor);
  }

  #drag(before, point) {
    if (this.path) {
      if (this.tool === "box") this.path = [this.path[0], point];
      else this.path.push(point);
    } else this.#stroke(before, this.cursor);
  }

  #release() {
    if (!this.pressed) return;
    this.pressed = false;
    if (this.path) return this.#closePath();
    this.#changed();
  }

  #closePath() {
    const path = this.path;
    this.path = null;
    const corners = this.tool === "box" ? [path[0], [path.at(-1)[0], path[0][1]], path.at(-1), [path[0][0], path.at(-1)[1]]] : path;
    if (corners.length < 3) return this.#hover();
    this.#remember();
    this.#polygon(corners);
    this.#changed();
    this.#hover();
  }

  get painted() {
    return this.tool === "eraser" ? this.blank : this.value;
  }

  /** All pixels within the brush's radius of the way from one pixel to another. */
  #stroke([x0, y0], [x1, y1]) {
    const radius = this.radius, value = this.painted, [dx, dy] = [x1 - x0, y1 - y0], length = dx * dx + dy * dy;
    const reach = Math.ceil(radius);
    const [left, right] = [Math.max(Math.min(x0, x1) - reach, 0), Math.min(Math.max(x0, x1) + reach, this.width - 1)];
    const [top, bottom] = [Math.max(Math.min(y0, y1) - reach, 0), Math.min(Math.max(y0, y1) + reach, this.height - 1)];
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const along = length ? Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / length, 0), 1) : 0;
        const [away, off] = [x - x0 - along * dx, y - y0 - along * dy];
        if (away * away + off * off <= Math.max(radius * radius, 0.3)) this.values[y * this.width + x] = value;
      }
    }
    this.#render(left, top, right + 1, bottom + 1);
  }

  /** All pixels whose centre lies inside, by the even-odd rule. */
  #polygon(corners) {
    const value = this.painted;
    const rows = corners.map(([, y]) => y);
    const top = Math.max(Math.floor(Math.min(...rows)), 0), bottom = Math.min(Math.ceil(Math.max(...rows)), this.height - 1);
    for (let y = top; y <= bottom; y++) {
      const middle = y + 0.5, crossings = [];
      corners.forEach(([x0, y0], place) => {
        const [x1, y1] = corners[(place + 1) % corners.length];
        if (y0 <= middle !== y1 <= middle) crossings.push(x0 + ((middle - y0) / (y1 - y0)) * (x1 - x0));
      });
      crossings.sort((one, other) => one - other);
      for (let pair = 0; pair + 1 < crossings.length; pair += 2) {
        const from = Math.max(Math.ceil(crossings[pair] - 0.5), 0), to = Math.min(Math.ceil(crossings[pair + 1] - 0.5), this.width);
        if (to > from) this.values.fill(value, y * this.width + from, y * this.width + to);
      }
    }
    this.#render();
  }

  /** All pixels of one value that touch each other. */
  #bucket([x, y]) {
    const { width, height, values } = this, value = this.painted, old = values[y * width + x];
    if (old === value) return;
    this.#remember();
    const waiting = [y * width + x];
    this.values[waiting[0]] = value;
    while (waiting.length) {
      const at = waiting.pop(), column = at % width;
      for (const next of [column ? at - 1 : -1, column < width - 1 ? at + 1 : -1, at - width, at + width]) {
        if (next >= 0 && next < width * height && values[next] === old) {
          values[next] = value;
          waiting.push(next);
        }
      }
    }
    this.#render();
    this.#changed();
  }

  #key(event) {
    const step = event.shiftKey ? 1 : Math.max(Math.round(this.radius), 1);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) {
      event.preventDefault();
      const [dx, dy] = moves[event.key];
      this.cursor = [Math.min(Math.max(this.cursor[0] + dx, 0), this.width - 1), Math.min(Math.max(this.cursor[1] + dy, 0), this.height - 1)];
      this.near = true;
      if (this.path && this.tool === "box") this.path = [this.path[0], this.#corner()];
      this.#hover();
    } else if (event.key === " ") {
      event.preventDefault();
      if (this.tool === "box" && this.path) return this.#closePath();
      if (this.tool === "box") this.path = [[...this.cursor], this.#corner()];
      else if (this.tool === "lasso") (this.path ||= []).push([this.cursor[0] + 0.5, this.cursor[1] + 0.5]);
      else {
        this.#press(this.cursor);
        this.#release();
      }
      this.#hover();
    } else if (event.key === "Enter" && this.path) {
      event.preventDefault();
      this.#closePath();
    } else if (event.key === "Escape" && this.path) {
      this.path = null;
      this.#hover();
    } else if (event.key.toLowerCase() === "z") event.shiftKey ? this.redo() : this.undo();
  }

  #corner() {
    return [this.cursor[0] + 1, this.cursor[1] + 1];
  }
}

/** The pixels of a picture of the server: {width, height, data} with four numbers of each. */
export async function pixelsOf(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || `the studio answered ${answer.status}`);
  const picture = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = h("canvas", {});
  canvas.width = picture.width;
  canvas.height = picture.height;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(picture, 0, 0);
  return pen.getImageData(0, 0, picture.width, picture.height);
}

/** A place to drop a file on or to choose one; `role` is handed to the tab's `take`. */
export function filePlace(studio, role, words) {
  const input = h("input", { type: "file", class: "file", onchange: () => input.files[0] && studio.take(input.files[0], place).then(() => (input.value = "")) });
  const place = h("label", { class: "place", "data-takes": role }, input, h("span", {}, words));
  return place;
}
