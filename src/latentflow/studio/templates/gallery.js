// A grid of pictures that fills as they come, and the dialog of one picture: its request, and what can be done with it.
import { ask, download, h, short, upload } from "./api.js";

const dialog = document.getElementById("detail");
let offered = {}; // what main.js lets one do with a picture: {vary, keepSeed, useAsInput}

export function offer(actions) {
  offered = actions;
}

export const pathOf = (picture, kind = "shown") => `/page/jobs/${picture.job}/${picture.row}/${kind}`;

export class Gallery {
  constructor({ label = "Pictures", wide = false } = {}) {
    this.pictures = [];
    this.hint = h("p", { class: "hint" });
    this.root = h("section", { class: `gallery${wide ? " wide" : ""}`, "aria-label": label });
    this.root.append(this.hint);
  }

  say(hint) {
    this.hint.textContent = hint;
  }

  /** Empty places for `total` pictures. */
  begin(total, [width, height] = [1, 1]) {
    this.pictures = [];
    this.places = Array.from({ length: total }, () => {
      const place = h("figure", { class: "tile waiting" }, h("div", { class: "blank" }));
      place.firstChild.style.aspectRatio = `${width} / ${height}`;
      return place;
    });
    this.hint.textContent = "";
    this.root.replaceChildren(this.hint, ...this.places);
  }

  add(picture) {
    const index = this.pictures.push(picture) - 1;
    const place = this.places[index];
    if (!place) return;
    place.classList.remove("waiting");
    const image = h("img", { src: pathOf(picture), alt: picture.caption || `seed ${picture.seed}`, draggable: "false" });
    const button = h("button", { type: "button", class: "picture", title: "Show its request", onclick: () => open(this.pictures, index) }, image);
    place.replaceChildren(button, h("figcaption", {}, picture.caption || `seed ${picture.seed}`));
  }

  /** Remove the places of pictures that will not come. */
  end() {
    for (const place of this.root.querySelectorAll(".waiting")) place.remove();
  }
}

/** The dialog of pictures[index]; the arrow keys go to the neighbours. */
export async function open(pictures, index) {
  const picture = pictures[index];
  const body = h("div", { class: "facts" }, h("p", { class: "hint" }, "reading its request ..."));
  const amount = h("input", { type: "range", min: 0.05, max: 1, step: 0.05, value: 0.3, "aria-label": "How far to vary" });
  const isSeeded = ["sample", "vary"].includes(picture.task);
  const act = (name) => {
    dialog.close();
    offered[name]?.(picture, Number(amount.value));
  };
  const actions = h("div", { class: "actions" },
    h("button", { type: "button", class: "main", onclick: () => download(pathOf(picture, "file")) }, "Download"),
    isSeeded && h("button", { type: "button", onclick: () => act("vary"), title: "Pictures near this one" }, "Vary"),
    isSeeded && h("label", { class: "inline" }, "by", amount),
    h("button", { type: "button", onclick: () => act("keepSeed"), title: "Its request in the controls, with the seed locked" }, "More like this seed"),
    h("button", { type: "button", onclick: () => act("useAsInput"), title: "In Edit and Fill" }, "Use as input"));
  const move = (step) => pictures[index + step] && open(pictures, index + step);
  const turn = h("div", { class: "turn" },
    h("button", { type: "button", disabled: index === 0, onclick: () => move(-1), "aria-label": "Previous picture" }, "‹"),
    h("span", {}, `${index + 1} of ${pictures.length}`),
    h("button", { type: "button", disabled: index === pictures.length - 1, onclick: () => move(1), "aria-label": "Next picture" }, "›"),
    h("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close"));
  dialog.onkeydown = (event) => {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  };
  dialog.replaceChildren(turn, h("img", { src: pathOf(picture), alt: picture.caption || "", class: "large" }), h("div", { class: "about" }, actions, body));
  if (!dialog.open) dialog.showModal();
  turn.querySelector(".close").focus();
  try {
    body.replaceChildren(...facts(await ask(pathOf(picture, "facts"))));
  } catch (error) {
    body.replaceChildren(h("p", { class: "trouble" }, error.message));
  }
}

function facts(found) {
  const { sampling = {}, drawn_by: origin = {} } = found;
  const guided = sampling.guidance === 1 ? "off" : `${short(sampling.guidance)}, at times ${sampling.guidance_interval.join(" to ")}`;
  const rows = {
    seed: found.seeds?.join(", "),
    class: found.class_name && found.to_class_name ? `${found.class_name} to ${found.to_class_name}` : found.class_name,
    ...Object.fromEntries(Object.entries(found.conditions || {}).map(([name, values]) => [name, String(values[0])])),
    "from": found.start < 1 ? `time ${found.start}` : null,
    ...found.inputs,
    guidance: guided,
    solver: /dopri5|bosh3/.test(sampling.solver) ? `${sampling.solver}, tolerance ${sampling.rtol}` : `${sampling.solver}, ${sampling.steps} steps`,
    evaluations: short(found.evaluations),
    model: origin.model,
    weights: origin.weights,
  };
  const shown = Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return [
    h("dl", {}, shown.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("details", {}, h("summary", {}, "The whole record, as it is in the file"), h("pre", {}, JSON.stringify(found, null, 1))),
  ];
}

/** A picture of a job as an upload, with its request in it. */
export async function asUpload(picture) {
  const answer = await fetch(pathOf(picture, "file"));
  return upload(await answer.blob(), picture.name);
}
