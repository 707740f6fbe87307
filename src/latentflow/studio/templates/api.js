// Elements, and questions to the server of this page. Text of people and files enters the page as text, never as HTML.

/** An element with attributes, listeners ("onclick") and children; strings become text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "disabled", "hidden", "selected", "htmlFor", "open"].includes(name)) element[name] = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** What the server refused, in one line for the user. */
export class Refused extends Error {}

/** The JSON answer of the server. Throws Refused with one line. */
export async function ask(path, { method = "GET", json, body, headers = {} } = {}) {
  if (json !== undefined) {
    body = JSON.stringify(json);
    headers = { "Content-Type": "application/json", ...headers };
    method = "POST";
  }
  let answer;
  try {
    answer = await fetch(path, { method, body, headers });
  } catch {
    throw new Refused("the studio does not answer; is `latentflow studio` still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(found.error || found.detail?.toString() || `the studio answered ${answer.status}`);
  return found;
}

/** Hand a file or a blob over to the server, which keeps it while it runs: {id, name, width, height, ...}. */
export function upload(blob, name) {
  const headers = { "Content-Type": "application/octet-stream" };
  return ask(`/page/uploads?name=${encodeURIComponent(name || blob.name || "picture.png")}`, { method: "POST", body: blob, headers });
}

/** Call `act` when nothing has happened for a while. */
export function settled(act, milliseconds = 250) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), milliseconds);
  };
}

/** A time for people: "3 s", "1 min 20 s", "2 h 5 min". */
export function duration(seconds) {
  if (seconds < 1) return `${Math.max(seconds, 0.01).toPrecision(1)} s`;
  if (seconds < 59.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A number for people, of few digits. */
export function short(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "-";
  return Number.isInteger(number) ? number.toLocaleString("en") : Number(number.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

/** Save a file of the server under its own name. */
export function download(path) {
  const link = h("a", { href: path, download: "" });
  document.body.append(link);
  link.click();
  link.remove();
}
