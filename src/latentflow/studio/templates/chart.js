// Line charts as SVG: axes, a grid, one line for each series, and the values under the pointer.
import { short } from "./api.js";

const SPACE = "http://www.w3.org/2000/svg";

function shape(tag, attributes, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers that divide a range into about `count` parts. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/**
 * A chart of series [{name, points: [[x, y], ...]}]. `across` and `up` name the axes.
 * It is drawn for `width` x 260 units and scales with its place.
 */
export function chart(series, { across, up, width = 560 }) {
  const height = 260, [left, right, top, bottom] = [52, 28, 12, 38];
  const points = series.flatMap((one) => one.points);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${up} by ${across}` });
  if (!points.length) return picture;
  const [x0, x1] = [Math.min(...points.map(([x]) => x)), Math.max(...points.map(([x]) => x))];
  const sorted = points.map(([, y]) => y).sort((one, other) => one - other);
  const most = sorted[Math.floor(0.99 * (sorted.length - 1))]; // the first steps of a run may be far above all others
  const [y0, y1] = [Math.max(sorted[0] - 0.05 * (most - sorted[0]), 0), most + 0.05 * (most - sorted[0]) || 1];
  const place = ([x, y]) => [left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right), Math.max(top + (1 - (y - y0) / (y1 - y0 || 1)) * (height - top - bottom), top)];
  for (const y of ticks(y0, y1, 4)) {
    const [, at] = place([x0, y]);
    picture.append(shape("line", { x1: left, x2: width - right, y1: at, y2: at, class: "grid" }), shape("text", { x: left - 7, y: at + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, width < 400 ? 3 : 5)) picture.append(shape("text", { x: place([x, y0])[0], y: height - bottom + 17, "text-anchor": "middle" }, short(x)));
  picture.append(shape("text", { x: width - right, y: height - 3, "text-anchor": "end", class: "axis" }, across));
  series.forEach((one, number) => {
    const drawn = one.points.map(place);
    const line = shape("polyline", { points: drawn.map((at) => at.map((value) => value.toFixed(1)).join()).join(" "), class: `series s${number}` });
    picture.append(line);
    if (one.points.length < 30) drawn.forEach(([x, y]) => picture.append(shape("circle", { cx: x, cy: y, r: 2.6, class: `mark s${number}` })));
  });
  return picture;
}

/** What the colours of a chart's series mean. */
export function legend(series) {
  const list = document.createElement("ul");
  list.className = "legend";
  series.forEach((one, number) => {
    const item = document.createElement("li");
    const swatch = shape("svg", { viewBox: "0 0 24 10", width: 24, height: 10, "aria-hidden": "true" }, shape("line", { x1: 1, x2: 23, y1: 5, y2: 5, class: `series s${number}` }));
    item.append(swatch, one.name);
    list.append(item);
  });
  return list;
}
