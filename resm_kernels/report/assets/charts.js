// Curves, drawn by Vega-Lite: the spectra of a cell, and a measure over the layers.
"use strict";

const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 2], [3, 5]];

function colour(name) {
  const probe = document.getElementById("detail-title");
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = "";
  return found;
}

function theme() {
  const soft = colour("soft"), line = colour("line");
  return {
    background: "transparent",
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: "transparent" },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
      labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelFlush: true,
    },
    legend: { labelColor: colour("ink"), labelFontSize: 12, title: null, symbolSize: 260, symbolStrokeWidth: 2.5, labelLimit: 320 },
  };
}

// Entries stand side by side where the widest leaves room: a letter takes some 8 pixels, a line's sample some 40.
function legendColumns(names) {
  const widest = 8 * Math.max(...names.map((name) => name.length)) + 40;
  return Math.max(1, Math.min(names.length, Math.floor((document.getElementById("detail-body").clientWidth - 60) / widest)));
}

// The encoding that tells curves apart: by colour and by dashes, so that neither is needed alone.
// A series has the colour of its position among the experts in every chart.
function bySeries(names, positions = names.map((_, i) => i)) {
  const colours = positions.map((i) => colour(`series-${i % DASHES.length}`));
  const dashes = positions.map((i) => DASHES[i % DASHES.length]);
  return {
    color: {
      field: "series", type: "nominal", sort: null,
      scale: { domain: names, range: colours },
      legend: names.length > 1 ? { orient: "bottom", direction: "vertical", columns: legendColumns(names) } : null,
    },
    strokeDash: { field: "series", type: "nominal", sort: null, scale: { domain: names, range: dashes } },
  };
}

// Ticks of a logarithmic axis: the powers of ten within some numbers, or 1, 2 and 5 times them where there are few.
function logTicks(numbers) {
  const low = Math.min(...numbers) * (1 - 1e-9), high = Math.max(...numbers) * (1 + 1e-9);
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  const within = (factors, step) => {
    const ticks = [];
    for (let power = to; power >= from; power -= step) ticks.push(...factors.map((factor) => factor * 10 ** power));
    return ticks.filter((tick) => low <= tick && tick <= high);
  };
  const powers = within([1], Math.max(1, Math.ceil((to - from) / 6)));
  return powers.length > 2 ? powers : within([1, 2, 5], 1);
}

// Vega makes the description the label of the drawing for screen readers.
async function draw(element, description, names, points, layers, height) {
  const legend = names.length > 1 ? 26 + 18 * Math.ceil(names.length / legendColumns(names)) : 0;
  const specification = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    description, width: "container", height: height + legend, autosize: { type: "fit", contains: "padding" },
    data: { values: points }, layer: layers,
  };
  // "ast": expressions are interpreted, because the page's policy forbids to compile them.
  const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false, tooltip: false, config: theme() };
  await window.vegaEmbed(element, specification, options);
}

function drawSpectra(element, spectra, names) {
  const points = [];
  spectra.values.forEach((values, e) => values.forEach((value, k) => {
    if (value > 0) points.push({ series: names[e], i: spectra.indices[k], value });
  }));
  const what = `Singular values of ${spectra.tensor}, relative to the largest, on logarithmic axes, for ${names.join(", ")}.`;
  return draw(element, what, names, points, [{
    mark: { type: "line", strokeWidth: 2 },
    encoding: {
      x: { field: "i", type: "quantitative", scale: { type: "log", nice: false }, axis: { title: "number i of the singular value", values: logTicks(points.map((p) => p.i)), format: "~s" } },
      y: { field: "value", type: "quantitative", scale: { type: "log", nice: false }, axis: { title: "σᵢ / σ₁", values: logTicks(points.map((p) => p.value)), format: "~g" } },
      ...bySeries(names, spectra.experts),
    },
  }], 240);
}

function drawOverLayers(element, measure, column, points, names, row) {
  const type = measure.scale === "logarithmic" ? "log" : "linear";
  const x = { field: "layer", type: "quantitative", scale: { nice: false }, axis: { title: "layer", tickMinStep: 1, format: "d", grid: false } };
  const y = { field: "value", type: "quantitative", scale: type === "log" ? { type } : { zero: false }, axis: { title: measure.unit || null, tickCount: 4, format: type === "log" ? "~g" : "~r" } };
  if (type === "log") y.axis.values = logTicks(points.map((p) => p.value));
  return draw(element, `${measure.title} of ${column} over the layers.`, names, points, [
    { mark: { type: "rule", color: colour("soft"), strokeWidth: 1.5 }, data: { values: [{ layer: row }] }, encoding: { x } },
    { mark: { type: "line", strokeWidth: 2, point: names.length === 1 }, encoding: { x, y, ...bySeries(names) } },
  ], 180);
}
