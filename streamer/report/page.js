"use strict";
// Builds the page from its embedded data.

const CARDS = 6;
const ROWS = 50;

function section(title, note) {
  const node = html("section", {}, html("h2", {}, title), note ? html("p", { class: "note" }, note) : null);
  document.querySelector("main").append(node);
  return node;
}

const text = (value) => document.createTextNode(value);
const error = (value, se) => (value === null ? "–" : `${percent(value)} ± ${(100 * (se ?? 0)).toFixed(1)}`);

// Evaluation ---------------------------------------------------------------------------------------------------------

function seriesOf(variants, methods) {
  const ends = variants.filter((v) => v.series === "base" || v.series === "adapter");
  const series = new Map();
  for (const v of variants) {
    if (ends.includes(v)) continue;
    if (!series.has(v.series)) series.set(v.series, []);
    series.get(v.series).push(v);
  }
  const adapter = ends.find((v) => v.series === "adapter");
  return [...series].map(([name, own], i) => {
    const strengths = own.every((v) => v.lambda !== null);
    own.sort(strengths ? (a, b) => b.lambda - a.lambda : (a, b) => b.kept - a.kept);
    const known = methods.indexOf(name); // the first five colours belong to the methods, in order
    return { name, colour: `var(--s${known < 0 ? 5 + (i % 2) : known})`, variants: strengths && adapter ? [adapter, ...own] : own };
  });
}

function drawTradeoff(parent, tree, key, label, caption) {
  const points = tree.variants.filter((v) => v.kept !== null && v[key] !== null);
  const series = seriesOf(points, tree.methods);
  const inside = (v) => v.kept >= -0.05 && v.kept <= 1.2 && v[key] >= -0.3 && v[key] <= 1.4;
  const shown = points.filter(inside), outside = points.filter((v) => !inside(v));
  const drawn = figure(parent, `trade-off ${key}`, caption, (width) => {
    const range = (name, least, most) => ({
      least: Math.min(least, ...shown.map((v) => v[name] - v[`${name}_se`])), most: Math.max(most, ...shown.map((v) => v[name] + v[`${name}_se`])),
      format: (v) => percent(v, 0),
    });
    const across = { ...range("kept", 0, 1.03), label: tree.figure ?? "learning kept" }, up = { ...range(key, 0, 1.05), label };
    const { picture, sx, sy } = axes(width, Math.min(360, Math.max(260, width * 0.7)), across, up);
    const frame = picture.viewBox.baseVal;
    picture.append(svg("line", { class: "limit", x1: sx(tree.keep), x2: sx(tree.keep), y1: 8, y2: frame.height - 38 }));
    for (const one of series) {
      const own = one.variants.filter(inside);
      picture.append(curve(own.map((v) => [sx(v.kept), sy(v[key])]), one.colour, { opacity: 0.6 }));
    }
    const colourOf = (v) => series.find((s) => s.name === v.series)?.colour ?? "var(--ink)";
    for (const v of shown) {
      const colour = colourOf(v), x = sx(v.kept), y = sy(v[key]);
      const wide = sx(v.kept + v.kept_se) - x, tall = y - sy(v[key] + v[`${key}_se`]);
      const group = svg("g", { css: { stroke: colour } }, tip(`${v.name}: ${error(v[key], v[`${key}_se`])} left, ${error(v.kept, v.kept_se)} kept`),
                        svg("line", { x1: x - wide, x2: x + wide, y1: y, y2: y }), svg("line", { x1: x, x2: x, y1: y - tall, y2: y + tall }),
                        svg("circle", { cx: x, cy: y, r: 3.5, css: { fill: tree.front.includes(v.name) ? colour : "var(--paper)" } }));
      if (v.name === tree.suggested) {
        group.append(svg("circle", { cx: x, cy: y, r: 9, css: { fill: "none", "stroke-width": "2" } }));
      }
      picture.append(group);
    }
    const rank = (v) => (v.name === tree.suggested ? 0 : v.lambda === null ? 1 : 2);
    placeTexts(picture, [...shown].sort((a, b) => rank(a) - rank(b)).map((v) => ({
      x: sx(v.kept), y: sy(v[key]), gap: v.name === tree.suggested ? 11 : 6,
      name: rank(v) === 2 ? v.name.replace(`${v.series} `, "") : v.name, colour: colourOf(v),
    })), { left: sx(across.least), right: frame.width, bottom: sy(up.least) });
    return picture;
  });
  const disc = (colour, fill) => svg("circle", { cx: 7, cy: 6, r: 4, css: { stroke: colour, "stroke-width": "2", fill } });
  legend(drawn.node, [...series.map((s) => [s.name, disc(s.colour, s.colour)]), ["hollow: another variant is better in both", disc("var(--soft)", "none")]]);
  if (outside.length) {
    drawn.node.append(html("figcaption", {}, `Outside the frame: ${outside.map((v) => `${v.name} (kept ${percent(v.kept, 0)}, left ${percent(v[key], 0)})`).join(", ")}.`));
  }
  return drawn;
}

function showEvaluation(tree) {
  const part = section("What each variant keeps and forgets", `Measured on ${tree.texts.general} (general) and ${tree.texts.task} (task)${tree.others.map((name) => `, and on ${name}`).join("")}; bars are standard errors. `
    + "By definition, the base is at 0% and the adapter at 100% on both axes. The dashed line is the share to keep; the ring marks the suggestion.");
  const pair = html("div", { class: "pair" });
  for (const [key, label, caption] of [
    ["divergence", "KL left", "Forgetting: the divergence from the base (KL) on general text. Lower and further right is better."],
    ["forgetting", "loss left", "The rise of the loss on general text."],
  ]) {
    if (tree.variants.some((v) => v.kept !== null && v[key] !== null)) drawTradeoff(pair, tree, key, label, caption);
  }
  part.append(pair.children.length ? pair : html("p", {}, "Base and adapter have nearly the same loss on the task's text, so no shares can be drawn."));
  showVariants(part, tree, tree.variants);
}

function showVariants(part, tree, variants) {
  const columns = tree.columns.map(({ head, about, cells }) => {
    const place = (v) => variants.indexOf(v), number = (v) => Number.parseFloat(cells[place(v)]);
    const key = (v) => (Number.isNaN(number(v)) ? -Infinity : number(v));
    const named = head === "variant" || head === "model";
    return { head, about, up: named, cell: (v) => text(cells[place(v)]), key: named ? place : key };
  });
  sortedTable(part, columns, variants, { id: "variants", marked: (v) => v.name === tree.suggested });
}

// Repair -------------------------------------------------------------------------------------------------------------

function showRepair(tree) {
  const part = section("What it keeps and leaves", "Measured on held-out sequences; bars are standard errors. By definition, the base is at 0% and the adapter at 100% "
    + "on both axes. The dashed line is the share to keep; the ring marks what was written.");
  drawTradeoff(part, tree, "divergence", "KL left", "Forgetting: the divergence from the base (KL) on general text. Lower and further right is better.");
  showVariants(part, tree, tree.variants.filter((v) => v.series !== "base"));
}

// Findings -----------------------------------------------------------------------------------------------------------

function showFindings(tree) {
  const matrices = decodeFindings(tree);
  if (!matrices.length) return;
  const grid = cellsOf(matrices);
  let card = null, table = null, filter = null;
  const choose = (matrix) => {
    const fresh = drawMatrix(chosen, matrix, tree.epsilon, true);
    if (card) card.remove();
    card = fresh;
  };
  const pick = (cell) => {
    choose([...cell.matrices].sort((a, b) => b.energy - a.energy)[0]);
    filter.value = "";
    table.show(cell.matrices);
    chosen.scrollIntoView({ block: "nearest" });
  };

  const where = section("Where the intruders are", "Layers from left to right. Click a cell to show its matrices below.");
  const energy = (cell) => {
    const all = sum(cell.matrices.map((m) => m.norm ** 2));
    return all ? sum(cell.matrices.map((m) => m.norm ** 2 * m.energy)) / all : 0;
  };
  const maps = html("div", { class: grid.layers.length <= 20 ? "pair" : null });
  where.append(maps);
  drawMap(maps, "map of intruders", "Number of intruders", grid, (cell) => sum(cell.matrices.map((m) => m.count)), (v) => String(Math.round(v)), pick);
  drawMap(maps, "map of energy", "Energy of intruders: their share of the delta", grid, energy, (v) => percent(v, 0), pick);

  const how = section("Similarity to the base");
  const pair = html("div", { class: "pair" });
  how.append(pair);
  drawAll(pair, matrices, tree.epsilon);
  drawThresholds(pair, tree.thresholds, tree.epsilon);

  const lambdas = section("What each λ removes");
  const halves = html("div", { class: "pair" });
  lambdas.append(halves);
  drawLambdas(halves, tree.lambdas);
  const beside = html("div", {});
  halves.append(beside);
  sortedTable(beside, [
    { head: "λ", about: "share of each intruder that is kept", cell: (r) => text(String(r[0])), key: (r) => r[0] },
    { head: "paper", about: "norm removed, as a share of the delta's", cell: (r) => text(percent(r[1])), key: (r) => r[1] },
    { head: "project", about: "norm removed, as a share of the delta's", cell: (r) => text(percent(r[2])), key: (r) => r[2] },
    { head: "norm left", about: "share of the norm that project leaves; a shrink whose λ equals this value leaves the same norm", cell: (r) => text(percent(r[3])), key: (r) => r[3] },
  ], tree.lambdas, { id: "lambdas" });
  const worst = matrices.reduce((a, b) => (b.dropped > a.dropped ? b : a));
  beside.append(html("p", { class: "note" }, worst.dropped > 0
    ? `With paper at λ = 0, up to ${percent(worst.dropped)} of a matrix's mitigated delta (${worst.name}) is lost in projection onto the adapter's rank. project and shrink lose nothing at any λ.`
    : "No method loses anything in projection onto the adapter's rank, at any λ."));

  const matter = section("Matrices that matter", "The matrices whose intruders have the most energy. Left: proven intervals of each direction's similarity to the base. "
    + "Right: singular values of base + adapter and of the base.");
  legend(matter, [["direction of the base", mark(7, 6, false)], ["intruder", mark(7, 6, true)],
                  ["the base's singular value of the same rank", svg("line", { x1: 1, x2: 13, y1: 6, y2: 6, css: { stroke: "var(--ink)", "stroke-width": "1.5" } })]]);
  const weight = (m) => m.energy * m.norm ** 2;
  const most = [...matrices].sort((a, b) => weight(b) - weight(a)).slice(0, CARDS);
  const cards = html("div", { class: "cards" });
  matter.append(cards);
  for (const m of most) drawMatrix(cards, m, tree.epsilon, false);

  const every = section("All matrices", "Click a name to draw its directions. Click a column heading to sort.");
  const chosen = html("div", {});
  every.append(chosen);
  filter = html("input", { type: "search", placeholder: "part of a name", "aria-label": "part of a name",
                           on: { input: () => table.show(matrices.filter((m) => m.name.includes(filter.value))) } });
  const all = () => { filter.value = ""; table.show(matrices); };
  every.append(html("div", { class: "tools screen" }, filter, html("button", { type: "button", on: { click: all } }, "all matrices")));
  const ranks = (m) => m.intruders.map((j) => j + 1);
  const name = (m) => html("button", { type: "button", on: { click: () => choose(m) } }, m.name);
  table = sortedTable(every, [
    { head: "matrix", about: "its tensor in the base", up: true, cell: name, key: (m) => m.number },
    { head: "shape", about: "rows × columns, dtype", up: true, cell: (m) => text(m.kind), key: (m) => m.kind },
    { head: "r", about: "rank of the adapter's factors", cell: (m) => text(m.rank || "–"), key: (m) => m.rank },
    { head: "intruders", about: "leading directions that resemble none of the base's", cell: (m) => text(String(m.count)), key: (m) => m.count },
    { head: "ranks", about: "ranks of the intruders; 1 is the largest singular value", up: true, cell: (m) => text(ranks(m).join(" ") || "–"), key: (m) => ranks(m)[0] ?? Infinity },
    { head: "similarity", about: "lowest similarity of a direction to the base", up: true, cell: (m) => text(m.least.toFixed(3)), key: (m) => m.least },
    { head: "σ₁", about: "largest singular value of base + adapter", cell: (m) => text(four(m.values[0] ?? 0)), key: (m) => m.values[0] ?? 0 },
    { head: "‖Δ‖", about: "norm of the delta", cell: (m) => text(four(m.norm)), key: (m) => m.norm },
    { head: "energy", about: "the intruders' share of the delta's squared norm", cell: (m) => text(percent(m.energy)), key: (m) => m.energy },
    { head: "lost", about: "share lost in projection onto the adapter's rank, by paper at λ = 0", cell: (m) => text(percent(m.dropped)), key: (m) => m.dropped },
    { head: "decided", about: "the solver that decided; open: not proven", up: true, cell: (m) => text(m.decided), key: (m) => m.decided },
  ], matrices, { id: "matrices", limit: ROWS, by: 0 });
  choose(most[0]);
}

// Commands -----------------------------------------------------------------------------------------------------------

for (const code of document.querySelectorAll("pre.command code")) {
  const button = html("button", { type: "button", class: "screen", on: { click: () => {
    getSelection().selectAllChildren(code);
    navigator.clipboard?.writeText(code.textContent).then(() => { button.textContent = "copied"; }, () => {});
  } } }, "copy");
  code.parentNode.append(button);
}

// Output -------------------------------------------------------------------------------------------------------------

function showOutput(tree) {
  const rows = tree.names.map((name, i) => ({
    ...named(name), number: i, count: tree.intruders?.[i], norm: tree.delta_norm[i], after: tree.delta_norm_after[i], dropped: tree.dropped?.[i],
    taken: tree.delta_norm[i] > 0 ? 1 - tree.delta_norm_after[i] / tree.delta_norm[i] : 0,
  }));
  if (!rows.length) return;
  const grid = cellsOf(rows);
  let table = null;
  const pick = (cell) => table.show(cell.matrices);
  const mean = (key) => (cell) => sum(cell.matrices.map((m) => Math.max(0, m[key]))) / cell.matrices.length;
  const count = (cell) => sum(cell.matrices.map((m) => m.count));
  const maps = [ // without pictures of zeros
    [tree.intruders && rows.some((m) => m.count), "map of intruders", "Intruders that were scaled", count, (v) => String(Math.round(v))],
    [rows.some((m) => m.taken > 0), "map of norms", "Decrease in the norm of the delta", mean("taken"), (v) => percent(v, 0)],
    [tree.dropped && rows.some((m) => m.dropped >= 5e-5), "map of losses", "Lost in projection onto the adapter's rank", mean("dropped"), (v) => percent(v)],
  ].filter(([drawn]) => drawn);
  if (maps.length) {
    const where = section("What was changed", "Layers from left to right. Click a cell to show its matrices below.");
    for (const [, name, caption, value, format] of maps) drawMap(where, name, caption, grid, value, format, pick);
  }
  const every = section("All matrices", "Click a column heading to sort.");
  every.append(html("div", { class: "tools screen" }, html("button", { type: "button", on: { click: () => table.show(rows) } }, "all matrices")));
  table = sortedTable(every, [
    { head: "matrix", about: "its tensor in the base", up: true, cell: (m) => text(m.name), key: (m) => m.number },
    tree.intruders && { head: "scaled", about: "intruders that were scaled", cell: (m) => text(String(m.count)), key: (m) => m.count },
    { head: "‖Δ‖", about: "norm of the delta", cell: (m) => text(four(m.norm)), key: (m) => m.norm },
    { head: "after", about: "norm of the written delta", cell: (m) => text(four(m.after)), key: (m) => m.after },
    { head: "fall", about: "decrease in the norm", cell: (m) => text(percent(m.taken)), key: (m) => m.taken },
    tree.dropped && { head: "lost", about: "share lost in projection onto the adapter's rank", cell: (m) => text(percent(m.dropped, 2)), key: (m) => m.dropped },
  ].filter(Boolean), rows, { id: "matrices", limit: ROWS, by: 0 });
}

// The page -----------------------------------------------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
if (data.evaluation) showEvaluation(data.evaluation);
if (data.findings) showFindings(data.findings);
if (data.repair) showRepair(data.repair);
if (data.samples?.length) {
  const part = section("What the adapter writes", "Beginnings of the task's text, which base + adapter wrote.");
  for (const sample of data.samples) part.append(html("blockquote", {}, sample));
}
if (data.output) showOutput(data.output);
for (const draw of figures) draw();
let waiting = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => { for (const draw of figures) draw(); });
});
document.documentElement.dataset.drawn = "yes";
