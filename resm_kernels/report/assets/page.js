// The heat map, its keyboard, and the panel of a cell.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);
const grid = byId("grid"), detail = byId("detail");
const cells = new Map(report.cells.map((cell) => [
  `c-${report.rows.indexOf(cell.row)}-${report.columns.indexOf(cell.column)}`, cell,
]));
const state = { measure: report.measures[0], expert: -1, cell: null };

// Elements are made with text, never with HTML: names come from files that anyone may have written.
function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5 || size < 1e-3) {
    const [digits, power] = value.toExponential(1).split("e");
    return `${digits}e${power.replace("+", "").replace("-", "−")}`.replace(/^-/, "−");
  }
  const text = value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
  return text.replace(/^-/, "−");
}

const place = (cell) => (/^\d+$/.test(cell.row) ? `layer ${cell.row}` : cell.row) + ` · ${cell.column}`;

// A cell's number for an expert, or for -1 the mean of those that the layer has.
function number(cell, measure, expert) {
  const value = cell.values[measure.key];
  if (!Array.isArray(value)) return value ?? null;
  if (expert >= 0) return value[expert] ?? null;
  const present = value.filter((v) => v !== null);
  return present.length ? present.reduce((a, b) => a + b, 0) / present.length : null;
}

// The colours of a measure span the numbers of all experts, so that experts can be compared with each other.
function colouring(measure) {
  const all = report.cells.flatMap((cell) => cell.values[measure.key] ?? []).filter((v) => v !== null);
  const logarithmic = measure.scale === "logarithmic", diverging = measure.scale === "diverging";
  const used = logarithmic ? all.filter((v) => v > 0) : all;
  let low = used.reduce((a, b) => Math.min(a, b), Infinity), high = used.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!used.length) [low, high] = logarithmic ? [1, 1] : [0, 0];
  if (diverging) {
    const centre = measure.centre ?? 0, reach = Math.max(high - centre, centre - low) || 1;
    [low, high] = [centre - reach, centre + reach];
  }
  const through = logarithmic ? Math.log : (v) => v;
  const share = (v) => {
    if (logarithmic && v <= 0) return 0;
    const span = through(high) - through(low);
    return span > 0 ? Math.min(1, Math.max(0, (through(v) - through(low)) / span)) : 0;
  };
  const stops = [0, 1, 2, 3, 4].map((i) => channels(colour(`${diverging ? "side" : "low"}-${i}`)));
  const ramp = (t) => {
    const k = Math.min(Math.floor(4 * t), 3), part = 4 * t - k;
    return `rgb(${stops[k].map((c, i) => Math.round(c + part * (stops[k + 1][i] - c))).join(", ")})`;
  };
  const middle = logarithmic ? Math.sqrt(low * high) : (low + high) / 2;
  return { of: (v) => ramp(share(v)), ramp, ticks: low === high ? [low] : [low, middle, high] };
}

const channels = (text) => text.match(/[\d.]+/g).slice(0, 3).map(Number);

function luminance(text) {
  const [r, g, b] = channels(text).map((part) => {
    const c = part / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Black or white, whichever differs more; the contrast is at least 4.5 on every colour.
const onto = (background) => (luminance(background) > 0.179 ? "#000" : "#fff");

function drawThumbnails() {
  document.querySelectorAll(".measures label").forEach((label, i) => {
    const measure = report.measures[i], scale = colouring(measure);
    const context = label.querySelector("canvas").getContext("2d");
    context.clearRect(0, 0, report.columns.length, report.rows.length);
    for (const [id, cell] of cells) {
      const value = number(cell, measure, -1);
      if (value === null) continue;
      const [, row, column] = id.split("-").map(Number);
      context.fillStyle = scale.of(value);
      context.fillRect(column, row, 1, 1);
    }
  });
}

function drawMap() {
  const { measure } = state, scale = colouring(measure);
  byId("measure-title").textContent = measure.title;
  byId("measure-help").textContent = measure.help;
  byId("who").disabled = !measure.per_expert;
  byId("who").hidden = !measure.per_expert || report.experts.length < 2;
  byId("legend-unit").textContent = (measure.unit || "number") + (measure.scale === "logarithmic" ? ", logarithmic colours" : "");
  byId("ramp").style.background = `linear-gradient(90deg, ${Array.from({ length: 17 }, (_, i) => scale.ramp(i / 16)).join(", ")})`;
  byId("ticks").replaceChildren(...scale.ticks.map((value) => make("span", format(value))));
  for (const [id, cell] of cells) {
    const td = byId(id), value = number(cell, measure, state.expert);
    td.classList.toggle("absent", value === null);
    td.classList.toggle("bad", Boolean(cell.problem));
    td.style.background = value === null ? "" : scale.of(value);
    td.style.color = value === null ? "" : onto(scale.of(value));
    td.textContent = [cell.problem && "!", value === null && cell.problem ? null : format(value)].filter(Boolean).join(" ");
    td.title = value === null || cell.problem ? why(cell, measure) : "";
  }
}

function why(cell, measure) {
  return cell.problem ?? cell.reasons[measure.key] ?? "this measure does not apply here";
}

function describe(cell) {
  const { measure } = state, value = cell.values[measure.key];
  const shown = number(cell, measure, state.expert);
  const parts = Array.isArray(value) && value.length > 1 && state.expert < 0
    ? ` (${value.map((v, e) => `${report.labels[e]} ${format(v)}`).join(", ")})` : "";
  byId("status").textContent = `${place(cell)}: ${shown === null ? why(cell, measure) : format(shown) + parts}`
    + (shown !== null && cell.problem ? `; ${cell.problem}` : "");
}

function focusCell(id) {
  grid.querySelectorAll('[tabindex="0"]').forEach((td) => { td.tabIndex = -1; });
  const td = byId(id);
  td.tabIndex = 0;
  td.focus({ preventScroll: true });
  td.scrollIntoView({ block: "nearest", inline: "center" });
}

// The nearest cell in a direction; places without a tensor are passed over.
function neighbour(id, down, right) {
  let [, row, column] = id.split("-").map(Number);
  for (;;) {
    row += down;
    column += right;
    if (row < 0 || column < 0 || row >= report.rows.length || column >= report.columns.length) return null;
    if (cells.has(`c-${row}-${column}`)) return `c-${row}-${column}`;
  }
}

function last(id, down, right) {
  for (let next = neighbour(id, down, right); next; next = neighbour(id, down, right)) id = next;
  return id;
}

grid.addEventListener("keydown", (event) => {
  const id = event.target.id;
  if (!cells.has(id)) return;
  const far = event.ctrlKey || event.metaKey;
  const go = {
    ArrowUp: () => neighbour(id, -1, 0), ArrowDown: () => neighbour(id, 1, 0),
    ArrowLeft: () => neighbour(id, 0, -1), ArrowRight: () => neighbour(id, 0, 1),
    Home: () => (far ? cells.keys().next().value : last(id, 0, -1)),
    End: () => (far ? [...cells.keys()].at(-1) : last(id, 0, 1)),
    PageUp: () => last(id, -1, 0), PageDown: () => last(id, 1, 0),
  }[event.key];
  if (go) {
    const next = go();
    if (next) focusCell(next);
  } else if (event.key === "Enter" || event.key === " ") {
    open(id);
  } else return;
  event.preventDefault();
});
grid.addEventListener("click", (event) => {
  const td = event.target.closest('[role="gridcell"]');
  if (td) { focusCell(td.id); open(td.id); }
});
for (const kind of ["focusin", "mouseover"]) {
  grid.addEventListener(kind, (event) => {
    const cell = cells.get(event.target.closest("td")?.id);
    if (cell) describe(cell);
  });
}

// A table with a row of numbers for each name; numbers are text, so that what is absent has its reason.
function table(heads, rows) {
  const element = make("table"), top = make("tr");
  heads.forEach((text) => top.append(make("th", text, { scope: "col" })));
  element.append(make("thead"), make("tbody"));
  element.tHead.append(top);
  for (const [name, ...values] of rows) {
    const row = make("tr"), head = make("th", null, { scope: "row" });
    head.append(name);
    row.append(head, ...values.map((text) => make("td", text)));
    element.tBodies[0].append(row);
  }
  const box = make("div", null, { class: "wide" });
  box.append(element);
  return box;
}

function fold(title, ...content) {
  const element = make("details");
  element.append(make("summary", title), ...content);
  return element;
}

// A table of the measures with a number for each expert, and one of those with a single number.
function measuresOf(cell) {
  const present = report.measures.filter((measure) => measure.key in cell.values);
  const named = (measure) => {
    const name = document.createDocumentFragment();
    name.append(measure.title, make("small", measure.unit));
    return name;
  };
  const each = present.filter((measure) => Array.isArray(cell.values[measure.key]));
  const single = present.filter((measure) => !Array.isArray(cell.values[measure.key]));
  const tables = [];
  if (each.length) tables.push(table(["", ...report.labels], each.map((m) => [named(m), ...cell.values[m.key].map(format)])));
  if (single.length) tables.push(table(["", "together"], single.map((m) => [named(m), format(cell.values[m.key])])));
  return tables;
}

// For every two experts, how far their dominant directions overlap, and how far random ones would.
function overlaps(spectra, names) {
  const against = (overlap, expected, a, b) => `${format(overlap[a][b])} (${format(expected[a][b])})`;
  const rows = names.flatMap((first, a) => names.slice(a + 1).map((second, k) => [
    `${first} and ${second}`,
    against(spectra.left_overlap, spectra.left_expected, a, a + 1 + k),
    against(spectra.right_overlap, spectra.right_expected, a, a + 1 + k),
  ]));
  return table(["0: none, 1: the same (random directions)", "left", "right"], rows);
}

// The number of a row's layer, and what stands before it in a model with several stacks; null for other rows.
function layer(row) {
  const found = row.match(/^(.* |)(\d+)$/s);
  return found && { stack: found[1], number: Number(found[2]) };
}

function overLayers(cell) {
  const { measure } = state, names = measure.per_expert ? report.labels : [measure.title], points = [];
  for (const other of report.cells) {
    const at = layer(other.row);
    if (other.column !== cell.column || !at || at.stack !== layer(cell.row)?.stack) continue;
    names.forEach((series, e) => {
      const value = number(other, measure, measure.per_expert ? e : -1);
      if (value !== null && (value > 0 || measure.scale !== "logarithmic")) points.push({ series, layer: at.number, value });
    });
  }
  return { measure, names, points };
}

async function open(id) {
  const cell = cells.get(id);
  state.cell = id;
  byId("detail-title").textContent = place(cell);
  byId("detail-role").textContent = [cell.shape, cell.role].filter(Boolean).join(" · ");
  byId("detail-problem").textContent = cell.problem ?? "";
  byId("previous").disabled = !neighbour(id, -1, 0);
  byId("next").disabled = !neighbour(id, 1, 0);
  const body = byId("detail-body"), waiting = [];
  body.replaceChildren();
  if (!detail.open) detail.showModal();
  detail.scrollTop = 0;
  const chart = (title) => {
    const element = make("div", null, { class: "chart" });
    body.append(make("h3", title), element);
    return element;
  };
  if (cell.spectra?.values.flat().some((value) => value > 0)) {
    const s = cell.spectra, names = s.experts.map((e) => report.labels[e]);
    waiting.push(drawSpectra(chart("Spectra of the task vectors"), s, names));
    body.append(table(["", ...names], [
      ["largest singular value σ₁", ...s.largest.map(format)], ["effective rank", ...s.effective_rank.map(format)],
      ["stable rank", ...s.stable_rank.map(format)], ["rank with 90 % of the energy", ...s.rank_90.map(String)],
      ["rank with 99 % of the energy", ...s.rank_99.map(String)], ["decay exponent", ...s.decay.map(format)],
    ]));
    body.append(fold("All points of the curves", table(["i", ...names], s.indices.map((i, k) => [i, ...s.values.map((v) => format(v[k]))]))));
    if (names.length > 1) body.append(make("h3", "Overlap of the experts' directions"), overlaps(s, names));
  } else {
    const cause = cell.spectra ? "no expert changes this cell's tensors" : "this cell's tensors are not decomposed, or the report was made without spectra";
    body.append(make("h3", "Spectra of the task vectors"), make("p", `There are none: ${cause}.`, { class: "note" }));
  }
  body.append(make("h3", "All measures"), ...measuresOf(cell));
  for (const [key, reason] of Object.entries(cell.reasons)) {
    body.append(make("p", `${report.measures.find((m) => m.key === key)?.title ?? key}: ${reason}.`, { class: "note" }));
  }
  const { measure, names, points } = overLayers(cell);
  if (points.length > names.length) {
    waiting.push(drawOverLayers(chart(`${measure.title} over the layers`), measure, cell.column, points, names, layer(cell.row).number));
  }
  const list = make("ul");
  for (const name of cell.tensors) {
    const item = make("li");
    item.append(make("code", name));
    list.append(item);
  }
  body.append(make("h3", cell.tensors.length === 1 ? "Tensor" : `${cell.tensors.length} tensors`), list);
  await Promise.all(waiting);
  detail.dataset.drawn = id;
}

function close() {
  detail.close();
}
detail.addEventListener("close", () => focusCell(state.cell));
detail.addEventListener("click", (event) => { if (event.target === detail) close(); });
byId("close").addEventListener("click", close);
byId("previous").addEventListener("click", () => open(neighbour(state.cell, -1, 0)));
byId("next").addEventListener("click", () => open(neighbour(state.cell, 1, 0)));

document.querySelectorAll("a[data-cell]").forEach((link) => link.addEventListener("click", (event) => {
  event.preventDefault();
  focusCell(link.dataset.cell);
  byId(link.dataset.cell).scrollIntoView({ block: "center", inline: "center" });
}));
document.querySelectorAll('input[name="measure"], input[name="expert"]').forEach((input) => {
  input.addEventListener("change", () => {
    if (input.name === "measure") state.measure = report.measures[Number(input.value)];
    else state.expert = Number(input.value);
    drawMap();
  });
});

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}
function paint() {
  byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  if (!report.measures.length || !cells.size) return;
  drawThumbnails();
  drawMap();
}
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
dark.addEventListener("change", paint);
grid.querySelector("td[role]")?.setAttribute("tabindex", "0");
paint();
