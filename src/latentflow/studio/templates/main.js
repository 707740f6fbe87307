// The page: its tabs, the model they share, and what is dropped on it.
import { ask, h, upload } from "./api.js";
import { CompareTab } from "./compare.js";
import { DrawTab } from "./draw.js";
import { EditTab } from "./edit.js";
import { FillTab } from "./fill.js";
import { asUpload, offer, pathOf } from "./gallery.js";
import { PaintTab } from "./paint.js";
import { RunsTab } from "./runs.js";

const kinds = [["draw", "Draw", DrawTab], ["fill", "Fill", FillTab], ["paint", "Paint a map", PaintTab],
  ["edit", "Edit", EditTab], ["compare", "Compare", CompareTab], ["runs", "Runs", RunsTab]];
const studio = { tabs: {}, model: null, state: null };
const trouble = document.getElementById("trouble");
const choice = document.getElementById("model");

studio.say = (line) => {
  trouble.hidden = !line;
  trouble.textContent = line || "";
};

studio.show = (name) => {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const chosen = button.dataset.tab === name;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    document.getElementById(`panel-${button.dataset.tab}`).hidden = !chosen;
  }
  history.replaceState(null, "", `#${name}`);
  studio.tabs[name].shown?.();
};

/** Open a model of the server, for all tabs. */
studio.use = async (key) => {
  studio.say("");
  choice.disabled = true;
  try {
    studio.model = await ask(`/page/model?key=${encodeURIComponent(key)}`);
    choice.value = key;
    for (const tab of Object.values(studio.tabs)) tab.setModel?.(studio.model);
    document.body.classList.remove("empty");
  } catch (error) {
    studio.say(error.message);
    if (studio.model) choice.value = studio.model.key;
    else document.body.classList.add("empty");
  } finally {
    choice.disabled = false;
  }
  return studio.model?.key === key;
};

/** The request of a picture back into the controls: `found` as the server reads it from the file. */
studio.restore = async (found) => {
  if (found.model && found.model !== studio.model?.key && !(await studio.use(found.model))) return;
  if (!studio.model) return studio.say("no model is open to draw it again");
  if (!found.model) { // another model may have other classes at these places
    const places = found.class_names.map((name) => studio.model.class_names.indexOf(name));
    if (places.length) found.request.classes = places.every((place) => place >= 0) ? places : undefined;
  }
  const tab = { sample: "draw", vary: "draw", inpaint: "fill", "mask-to-image": "paint" }[found.task] || "edit";
  if (!studio.tabs[tab]) return studio.say(`a picture of ${found.task}, for which this page has no controls`);
  studio.show(tab);
  studio.tabs[tab].restore(found.request, found);
  studio.say(found.note);
};

function makeTabs() {
  const list = document.getElementById("tabs"), panels = document.getElementById("panels");
  for (const [name, title, Tab] of kinds) {
    const tab = (studio.tabs[name] = new Tab(studio));
    list.append(h("button", { type: "button", role: "tab", id: `tab-${name}`, "data-tab": name, "aria-controls": `panel-${name}`, onclick: () => studio.show(name) }, title));
    panels.append(h("section", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`, hidden: true }, tab.root));
  }
  list.addEventListener("keydown", (event) => {
    const names = kinds.map(([name]) => name);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = names[(names.indexOf(event.target.dataset.tab) + step + names.length) % names.length];
    studio.show(next);
    document.getElementById(`tab-${next}`).focus();
  });
}

/** A picture of latentflow that is dropped anywhere restores its request; other pictures go to the tab that is shown. */
function watchDrops() {
  const shade = document.getElementById("drop");
  let depth = 0;
  const hasFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  document.addEventListener("dragenter", (event) => { if (hasFile(event)) shade.hidden = ++depth < 1; });
  document.addEventListener("dragleave", (event) => { if (hasFile(event)) shade.hidden = --depth < 1; });
  document.addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
  document.addEventListener("drop", async (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    depth = 0;
    shade.hidden = true;
    await studio.take(event.dataTransfer.files[0], event.target);
  });
}

studio.take = async (file, target) => {
  const shown = document.querySelector("[role=tab][aria-selected=true]").dataset.tab;
  const own = target?.closest?.("[data-takes]")?.dataset.takes; // a place for files of its own, in the tab that is shown
  studio.say("");
  try {
    if (own) return await studio.tabs[shown].take(file, own);
    const found = await upload(file, file.name);
    if (found.restored) await studio.restore(found.restored);
    else if (studio.tabs[shown].takeUpload) await studio.tabs[shown].takeUpload(found);
    else studio.say(`${found.name} has no request in it: it was not drawn by latentflow, or its metadata was removed`);
  } catch (error) {
    studio.say(error.message);
  }
};

function watchTheme() {
  const theme = document.getElementById("theme");
  const set = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
  };
  theme.value = localStorage.getItem("theme") || "auto";
  set(theme.value);
  theme.addEventListener("change", () => {
    localStorage.setItem("theme", theme.value);
    set(theme.value);
  });
}

offer({
  vary: async (picture, amount) => {
    const { request } = await ask(pathOf(picture, "request"));
    const { num, image_size, ...kept } = request;
    studio.show("draw");
    studio.tabs.draw.vary({ ...kept, amount, num: 8 });
  },
  keepSeed: async (picture) => studio.restore(await ask(pathOf(picture, "request"))),
  useAsInput: async (picture) => {
    const tab = studio.tabs.edit ? "edit" : "fill";
    const found = await asUpload(picture);
    studio.tabs.fill?.takeUpload(found);
    studio.tabs.edit?.takeUpload(found);
    studio.show(tab);
  },
});

async function begin() {
  watchTheme();
  makeTabs();
  watchDrops();
  studio.show(kinds.some(([name]) => name === location.hash.slice(1)) ? location.hash.slice(1) : "draw");
  choice.addEventListener("change", () => studio.use(choice.value));
  try {
    studio.state = await ask("/page/state");
  } catch (error) {
    return studio.say(error.message);
  }
  studio.fillModels();
  for (const tab of Object.values(studio.tabs)) tab.setState?.(studio.state);
  if (studio.state.models.length) await studio.use(studio.state.models[0].key);
  else {
    document.body.classList.add("empty");
    studio.say("there is no model yet: the run has written none so far");
    studio.show("runs");
  }
  document.body.dataset.ready = "yes";
}

studio.fillModels = () => {
  choice.replaceChildren(...studio.state.models.map(({ key, name }) => h("option", { value: key }, name)));
};

window.addEventListener("unhandledrejection", (event) => studio.say(event.reason?.message || String(event.reason)));
begin();
