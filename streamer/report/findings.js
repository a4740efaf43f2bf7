"use strict";
// Findings, drawn as maps, curves, and the directions of one matrix.

const NUMBER = /(^|[.[])(\d+)(?=[.\]]|$)/g;

// A name with its form, in which stars stand for numbers, and its first number, which is the layer.
function named(name) {
  const first = [...name.matchAll(NUMBER)][0];
  return { name, form: name.replace(NUMBER, "$1*"), layer: first ? Number(first[2]) : null };
}

function decodeFindings(tree) {
  return tree.matrices.map((m, number) => {
    const places = new Set(m.intruders);
    return { ...m, ...named(m.name), number, count: places.size, intruder: m.low.map((_, j) => places.has(j)) };
  });
}

// The part of a layer for each form, without the common beginning if the names stay distinct.
function partNames(forms) {
  const cut = (form) => form.replace(/^[^*]*?\*\./, "").replace(/\.?weight$/, "") || form;
  const names = new Map(forms.map((form) => [form, cut(form)]));
  return new Set(names.values()).size === names.size ? names : new Map(forms.map((form) => [form, form]));
}

// Cells by layer and part; a stack of experts has several matrices in a cell.
function cellsOf(matrices) {
  const forms = [...new Set(matrices.map((m) => m.form))];
  const layers = [...new Set(matrices.map((m) => m.layer))].sort((a, b) => (a ?? -1) - (b ?? -1));
  const cells = new Map();
  for (const m of matrices) {
    const key = `${m.layer}|${m.form}`;
    if (!cells.has(key)) cells.set(key, { form: m.form, layer: m.layer, matrices: [] });
    cells.get(key).matrices.push(m);
  }
  const names = partNames(forms);
  return { forms, layers, names, cells: [...cells.values()] };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

function drawMap(parent, label, caption, grid, value, format, pick) {
  const values = grid.cells.map(value);
  const most = Math.max(...values, 1e-12);
  return figure(parent, label, caption, (width) => {
    const left = 8 + 6.2 * Math.max(...grid.forms.map((form) => grid.names.get(form).length));
    const room = (width - left - 4) / grid.layers.length;
    const size = Math.max(9, Math.min(30, room));
    const tall = Math.max(15, Math.min(22, size));
    const top = 16;
    const across = left + size * grid.layers.length + 4;
    const picture = canvas(Math.max(across, left + 120 + 60), top + tall * grid.forms.length + 34);
    grid.forms.forEach((form, row) => {
      picture.append(svg("text", { x: left - 6, y: top + tall * (row + 0.5) + 4, "text-anchor": "end" }, grid.names.get(form)));
    });
    const step = Math.ceil(22 / size);
    grid.layers.forEach((layer, column) => {
      if (column % step === 0) {
        picture.append(svg("text", { class: "soft", x: left + size * (column + 0.5), y: top - 4, "text-anchor": "middle" }, layer ?? "–"));
      }
    });
    grid.cells.forEach((cell, i) => {
      const column = grid.layers.indexOf(cell.layer), row = grid.forms.indexOf(cell.form);
      const several = cell.matrices.length > 1 ? `, ${cell.matrices.length} matrices` : "";
      const fill = `color-mix(in oklab, var(--high) ${(100 * values[i] / most).toFixed(1)}%, var(--low))`;
      picture.append(svg("rect", {
        class: "cell pick", x: left + size * column, y: top + tall * row, width: size, height: tall,
        css: { fill }, on: { click: () => pick(cell) },
      }, tip(`${cell.layer === null ? "" : `layer ${cell.layer}, `}${grid.names.get(cell.form)}${several}: ${format(values[i])}`)));
    });
    const base = top + tall * grid.forms.length + 12, wide = 120;
    for (let i = 0; i < 12; i += 1) {
      picture.append(svg("rect", { x: left + (wide / 12) * i, y: base, width: wide / 12 + 0.5, height: 8,
                                   css: { fill: `color-mix(in oklab, var(--high) ${(100 * i) / 11}%, var(--low))` } }));
    }
    picture.append(svg("text", { class: "soft", x: left - 6, y: base + 8, "text-anchor": "end" }, format(0)),
                   svg("text", { class: "soft", x: left + wide + 6, y: base + 8 }, format(most)));
    return picture;
  });
}

// Each direction's similarity to the base, as the proven interval, and the threshold.
function drawSimilarity(parent, matrix, epsilon, caption) {
  return figure(parent, `similarity of ${matrix.name}`, caption, (width) => {
    const k = matrix.low.length;
    const { picture, sx, sy } = axes(width, 170, { least: 0.5, most: k + 0.5, label: "rank", room: 46, ticks: ticks(1, k, Math.min(10, width / 40)).filter((t) => t >= 1) },
                                     { least: 0, most: 1, label: "similarity" });
    picture.append(svg("line", { class: "limit", x1: sx(0.5), x2: sx(k + 0.5), y1: sy(epsilon), y2: sy(epsilon) }),
                   svg("text", { class: "soft", x: sx(k + 0.5) + 3, y: sy(epsilon) + 4 }, `ε ${epsilon}`));
    for (let j = 0; j < k; j += 1) {
      const intruder = matrix.intruder[j], x = sx(j + 1), low = matrix.low[j], high = matrix.high[j];
      const colour = intruder ? "var(--intruder)" : "var(--base)";
      const about = `rank ${j + 1}: ${low.toFixed(3)} to ${high.toFixed(3)}${intruder ? ", intruder" : ""}`;
      const group = svg("g", {}, tip(about));
      if (high - low > 0.004) {
        for (const end of [low, high]) group.append(svg("line", { x1: x - 3, x2: x + 3, y1: sy(end), y2: sy(end), css: { stroke: colour, "stroke-width": "1.5" } }));
        group.append(svg("line", { x1: x, x2: x, y1: sy(low), y2: sy(high), css: { stroke: colour, "stroke-width": "1.5" } }));
      }
      group.append(mark(x, sy(intruder ? high : low), intruder));
      picture.append(group);
    }
    return picture;
  });
}

function drawSpectrum(parent, matrix, caption) {
  return figure(parent, `spectrum of ${matrix.name}`, caption, (width) => {
    const { values, base_values: base } = matrix, k = values.length;
    const { picture, sx, sy } = axes(width, 170, { least: 0.5, most: k + 0.5, label: "rank", ticks: ticks(1, k, Math.min(10, width / 40)).filter((t) => t >= 1) },
                                     { least: 0, most: Math.max(0, ...values, ...base) || 1, label: "singular value" });
    for (let j = 0; j < k; j += 1) {
      const intruder = matrix.intruder[j], x = sx(j + 1);
      picture.append(svg("line", { x1: x, x2: x, y1: sy(0), y2: sy(values[j]), css: { stroke: intruder ? "var(--intruder)" : "var(--line)", "stroke-width": "1.5" } }),
                     svg("g", {}, tip(`rank ${j + 1}: σ = ${short(values[j])}${intruder ? ", intruder" : ""}`), mark(x, sy(values[j]), intruder)));
    }
    base.forEach((value, j) => picture.append(svg("g", { class: "of-base" }, tip(`rank ${j + 1} of the base: σ = ${short(value)}`),
      svg("line", { x1: sx(j + 1) - 6, x2: sx(j + 1) + 6, y1: sy(value), y2: sy(value), css: { stroke: "var(--ink)", "stroke-width": "1.5" } }))));
    return picture;
  });
}

function drawMatrix(parent, matrix, epsilon, chosen) {
  const pair = html("div", { class: "pair" });
  const cut = matrix.low.length < matrix.directions ? `; the ${matrix.low.length} largest of ${matrix.directions} directions` : "";
  const card = html("div", { class: chosen ? "card chosen" : "card" }, html("h3", {}, matrix.name),
                    html("p", { class: "note" }, `${matrix.kind}, ${matrix.count} intruder${matrix.count === 1 ? "" : "s"}, `
                      + `${percent(matrix.energy)} of the delta's energy${cut}`), pair);
  parent.append(card);
  drawSimilarity(pair, matrix, epsilon, null).draw();
  drawSpectrum(pair, matrix, null).draw();
  return card;
}

// All directions of all matrices, counted by rank and similarity; ε is an edge between two bins.
function drawAll(parent, matrices, epsilon) {
  const below = Math.max(1, Math.round(24 * epsilon)), above = Math.max(1, 24 - below), bins = below + above;
  const edges = Array.from({ length: bins + 1 }, (_, b) => (b <= below ? (epsilon * b) / below : epsilon + ((1 - epsilon) * (b - below)) / above));
  const bin = (m, j) => (m.intruder[j] ? Math.min(below - 1, Math.floor((m.high[j] / epsilon) * below))
    : below + Math.min(above - 1, Math.max(0, Math.floor(((m.low[j] - epsilon) / (1 - epsilon || 1)) * above))));
  const most = Math.max(...matrices.map((m) => m.low.length)), columns = Math.min(most, 50);
  const counts = Array.from({ length: columns }, () => new Float64Array(bins));
  for (const m of matrices) {
    for (let j = 0; j < m.low.length; j += 1) counts[Math.floor((j * columns) / most)][bin(m, j)] += 1;
  }
  const largest = Math.max(...counts.map((c) => Math.max(...c)), 1);
  const caption = "All directions by rank and similarity (darker: more of them). Intruders are below ε.";
  return figure(parent, "all directions", caption, (width) => {
    const x = { least: 0.5, most: most + 0.5, label: "rank", room: 46, ticks: ticks(1, most, Math.min(10, width / 40)).filter((t) => t >= 1) };
    const { picture, sx, sy } = axes(width, 240, x, { least: 0, most: 1, label: "similarity" });
    const wide = (sx(most + 0.5) - sx(0.5)) / columns;
    counts.forEach((column, i) => column.forEach((n, b) => {
      if (n === 0) return;
      const share = 20 + 80 * (Math.log1p(n) / Math.log1p(largest)), colour = b < below ? "var(--intruder)" : "var(--base)";
      picture.append(svg("rect", { x: sx(0.5) + wide * i + 0.5, y: sy(edges[b + 1]), width: Math.max(1, wide - 1), height: sy(edges[b]) - sy(edges[b + 1]),
                                   css: { fill: `color-mix(in oklab, ${colour} ${share.toFixed(0)}%, var(--paper))` } },
                         tip(`similarity ${edges[b].toFixed(2)} to ${edges[b + 1].toFixed(2)}: ${n}`)));
    }));
    picture.append(svg("line", { class: "limit", x1: sx(0.5), x2: sx(most + 0.5), y1: sy(epsilon), y2: sy(epsilon) }),
                   svg("text", { class: "soft", x: sx(most + 0.5) + 3, y: sy(epsilon) + 4 }, `ε ${epsilon}`));
    return picture;
  });
}

function drawThresholds(parent, rows, epsilon) {
  const caption = "Number of intruders by ε. The band shows the directions that the bounds leave open.";
  return figure(parent, "thresholds", caption, (width) => {
    const most = Math.max(...rows.map((r) => r[3]), 1);
    const { picture, sx, sy } = axes(width, 240, { least: 0, most: 1, label: "ε" }, { least: 0, most, label: "intruders", format: (v) => v.toLocaleString("en") });
    const low = rows.map((r) => [sx(r[0]), sy(r[2])]), high = rows.map((r) => [sx(r[0]), sy(r[3])]);
    picture.append(svg("path", { class: "band", d: `${path([...low, ...high.reverse()])}Z` }),
                   curve(rows.map((r) => [sx(r[0]), sy(r[1])]), "var(--intruder)"),
                   svg("line", { class: "limit", x1: sx(epsilon), x2: sx(epsilon), y1: sy(0), y2: sy(most) }));
    const own = rows.find((r) => r[0] === epsilon);
    if (own) picture.append(svg("text", { x: sx(epsilon) + 5, y: sy(most) + 10 }, `ε = ${epsilon}: ${own[1]}`));
    return picture;
  });
}

function drawLambdas(parent, rows) {
  const caption = "Norm removed by λ, as a share of the delta's. For paper it includes the base's part of the intruders.";
  const drawn = figure(parent, "lambdas", caption, (width) => {
    const most = Math.ceil(10 * Math.max(...rows.map((r) => Math.max(r[1], r[2])), 0.01)) / 10;
    const { picture, sx, sy } = axes(width, 220, { least: 0, most: 1, label: "λ" }, { least: 0, most, label: "norm removed", format: (v) => percent(v, 0) });
    picture.append(curve(rows.map((r) => [sx(r[0]), sy(r[1])]), "var(--s0)"), curve(rows.map((r) => [sx(r[0]), sy(r[2])]), "var(--s1)", { "stroke-dasharray": "7 4" }));
    return picture;
  });
  const line = (colour, dash) => svg("line", { x1: 0, x2: 14, y1: 6, y2: 6, "stroke-dasharray": dash, css: { stroke: colour, "stroke-width": "2" } });
  legend(drawn.node, [["paper", line("var(--s0)")], ["project", line("var(--s1)", "5 3")]]);
  return drawn;
}
