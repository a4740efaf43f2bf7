"use strict";
// Elements, scales and charts. All text from the data is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else if (key === "css") for (const [name, text] of Object.entries(value)) node.style.setProperty(name, text);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of [children].flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

const html = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make(SVG, tag, attributes, children);
const tip = (text) => svg("title", {}, text);

const percent = (share, digits = 1) => (share === null ? "–" : `${(100 * share).toFixed(digits)}%`);

function short(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Round steps between least and most, about as many as wanted.
function ticks(least, most, wanted) {
  const span = most - least || 1;
  const raw = span / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((n) => n * power >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(least / step - 1e-9); i * step <= most + step * 1e-9; i += 1) out.push(Number((i * step).toPrecision(12)));
  return out;
}

// A norm in a table, with the four digits that the terminal shows.
const four = (value) => value.toPrecision(4);

const figures = [];

// A box that scrolls sideways, with a hint while part of it is hidden.
function scroller(...children) {
  const hint = html("p", { class: "hint screen", hidden: "" }, "scroll sideways for more →");
  const box = html("div", { class: "scroll", tabindex: "0" }, ...children);
  const look = () => { hint.hidden = box.scrollWidth <= box.clientWidth + 1 || box.scrollLeft > 8; };
  box.addEventListener("scroll", look);
  return { box, hint, look };
}

// A figure drawn for its width, and drawn again when the width changes.
function figure(parent, label, caption, paint) {
  const { box: holder, hint, look } = scroller();
  const node = html("figure", { "data-figure": label }, caption ? html("figcaption", {}, caption) : null, hint, holder);
  parent.append(node);
  let width = 0;
  const draw = (again) => {
    const now = Math.max(240, Math.floor(holder.clientWidth || 320));
    if (now === width && !again) return;
    width = now;
    const picture = paint(width);
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", caption || label);
    holder.replaceChildren(picture);
    look();
  };
  figures.push(draw);
  return { node, draw };
}

function canvas(width, height) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
}

// Axes with labels; returns the picture and the scales of both.
function axes(width, height, x, y) {
  const format = { x: x.format || short, y: y.format || short };
  const yTicks = y.ticks || ticks(y.least, y.most, 4);
  const left = 12 + 6.4 * Math.max(...yTicks.map((t) => format.y(t).length)) + (y.label ? 14 : 0);
  const right = x.room || 14, top = 8, bottom = x.label ? 38 : 22;
  const sx = (v) => left + ((v - x.least) / (x.most - x.least || 1)) * (width - left - right);
  const sy = (v) => height - bottom - ((v - y.least) / (y.most - y.least || 1)) * (height - top - bottom);
  const picture = canvas(width, height);
  for (const t of yTicks) {
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: sy(t), y2: sy(t) }),
                   svg("text", { class: "soft", x: left - 5, y: sy(t) + 4, "text-anchor": "end" }, format.y(t)));
  }
  for (const t of x.ticks || ticks(x.least, x.most, Math.min(8, width / 60))) {
    picture.append(svg("line", { class: "axis", x1: sx(t), x2: sx(t), y1: height - bottom, y2: height - bottom + 4 }),
                   svg("text", { class: "soft", x: sx(t), y: height - bottom + 15, "text-anchor": "middle" }, format.x(t)));
  }
  if (x.label) picture.append(svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, x.label));
  if (y.label) {
    const at = `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`;
    picture.append(svg("text", { transform: at, "text-anchor": "middle" }, y.label));
  }
  return { picture, sx, sy };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function curve(points, colour, attributes) {
  return svg("path", { d: path(points), fill: "none", css: { stroke: colour, "stroke-width": "2" }, ...attributes });
}

// Texts beside points. A text that would leave the frame or cover a point or an earlier text is left out.
function placeTexts(picture, wanted, frame) {
  const taken = wanted.map(({ x, y }) => ({ x: x - 4, y: y + 4, wide: 8, tall: 8 }));
  for (const { x, y, name, gap, colour } of wanted) {
    const wide = 6.2 * name.length, tall = 12;
    const places = [[x + gap, y + 13], [x - gap - wide, y - 6], [x + gap, y - 6], [x - gap - wide, y + 13],
                    [x - gap - wide, y + 4], [x + gap, y + 4], [x - wide / 2, y - gap - 3], [x - wide / 2, y + gap + 11]];
    const free = places.find(([left, base]) => left > frame.left && left + wide < frame.right && base < frame.bottom
      && !taken.some((t) => left < t.x + t.wide && t.x < left + wide && base - tall < t.y && t.y - t.tall < base));
    if (!free) continue;
    taken.push({ x: free[0], y: free[1], wide, tall });
    picture.append(svg("text", { x: free[0], y: free[1], css: { fill: `color-mix(in srgb, ${colour} 75%, var(--ink))` } }, name));
  }
}

// A diamond for an intruder, a disc for a direction of the base.
function mark(x, y, intruder, size = 4) {
  if (!intruder) return svg("circle", { cx: x, cy: y, r: size * 0.8, css: { fill: "var(--base)" } });
  const d = size * 1.35;
  return svg("path", { d: `M${x} ${y - d}L${x + d} ${y}L${x} ${y + d}L${x - d} ${y}Z`, css: { fill: "var(--intruder)" } });
}

function legend(parent, entries) {
  const items = entries.map(([name, symbol]) => html("span", {}, svg("svg", { width: 14, height: 12, viewBox: "0 0 14 12" }, symbol), name));
  const node = html("div", { class: "legend" }, ...items);
  parent.append(node);
  return node;
}

// A table that sorts by the column heading clicked; columns have head, about, cell(row), key(row).
function sortedTable(parent, columns, rows, options) {
  const head = html("tr", {});
  const body = html("tbody", {});
  const more = html("div", { class: "more screen" });
  const state = { by: options.by ?? null, down: options.down ?? false, limit: options.limit || Infinity, rows, all: rows };
  const cell = (column, row) => {
    const shown = column.cell(row);
    return html("td", {}, shown);
  };
  const fill = () => {
    const shown = state.rows.slice(0, state.limit);
    body.replaceChildren(...shown.map((row) => html("tr", { class: options.marked?.(row) ? "marked" : null },
                                                    ...columns.map((c) => cell(c, row)))));
    const left = state.rows.length - shown.length;
    more.replaceChildren();
    if (left > 0) {
      const next = Math.min(left, 500);
      more.append(html("button", { type: "button", on: { click: () => { state.limit += next; fill(); } } },
                       `show ${next} more of ${left}`));
    }
    look();
  };
  const sort = () => {
    const column = columns[state.by];
    [...head.children].forEach((th, i) => {
      if (i === state.by) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    if (!column) return;
    const sign = state.down ? -1 : 1;
    const keyed = state.rows.map((row, i) => [column.key(row), i, row]);
    keyed.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]));
    state.rows = keyed.map((k) => k[2]);
  };
  columns.forEach((column, i) => {
    const click = () => {
      state.down = state.by === i ? !state.down : !column.up;
      state.by = i;
      sort();
      fill();
    };
    head.append(html("th", { scope: "col", title: column.about }, html("button", { type: "button", on: { click } }, column.head)));
  });
  const table = html("table", { id: options.id }, html("thead", {}, head), body);
  const { box, hint, look } = scroller(table);
  parent.append(hint, box, more);
  figures.push(look);
  const show = (chosen) => {
    state.rows = chosen;
    sort();
    fill();
  };
  show(rows);
  return { show, fill };
}
