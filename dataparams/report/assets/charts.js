"use strict";
// Small charts as SVG. Every text goes in as a text node, so that nothing from the data is ever read as markup.
const SVG = "http://www.w3.org/2000/svg";
const COLORS = ["var(--clean)", "var(--corrupt)", "var(--third)", "var(--fourth)", "var(--fifth)", "var(--sixth)", "var(--quiet)"];
const KIND_COLORS = { clean: COLORS[0], corrupt: COLORS[1], all: COLORS[0], mean: COLORS[0] };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function words(name) { return String(name).replaceAll("_", " "); }

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 1 : digits);
}

function ticks(low, high, count = 4) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((one) => one >= raw) ?? raw;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + 1e-9 * step; value += step) found.push(Math.abs(value) < 1e-12 ? 0 : value);
  return found;
}

function short(value) { return String(Number(value.toPrecision(4))).replace("-", "−"); }

function legend(entries) {
  return make("ul", { class: "legend" }, ...entries.map(([name, color]) => {
    const patch = make("i"); patch.style.background = color;
    return make("li", {}, patch, name);
  }));
}

function figure(name, svg, entries = [], note, fewest = 2) {
  const title = `${name[0].toUpperCase()}${name.slice(1)}`;
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", note ? `${title}. ${note}` : title);
  return make("figure", {}, make("h3", {}, title), svg, entries.length >= fewest ? legend(entries) : null, note ? make("p", { class: "quiet" }, note) : null);
}

// Axes on a canvas of 400 x 230; returns the svg and the two scales.
function axes(xs, ys, { xLabel = "", yLabel = "", xTicks, xNames } = {}) {
  const [left, right, top, bottom] = [46, 392, 8, 190];
  const svg = draw("svg", { viewBox: "0 0 400 228" });
  const x = (value) => left + (right - left) * (value - xs[0]) / ((xs[1] - xs[0]) || 1);
  const y = (value) => bottom - (bottom - top) * (value - ys[0]) / ((ys[1] - ys[0]) || 1);
  for (const value of ticks(...ys)) {
    svg.append(draw("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "axis" }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of xTicks ?? ticks(...xs, 6)) svg.append(draw("text", { x: x(value), y: bottom + 15, "text-anchor": "middle" }, xNames ? xNames(value) : short(value)));
  svg.append(draw("text", { x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle" }, xLabel));
  svg.append(draw("text", { x: -(top + bottom) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, yLabel));
  return { svg, x, y, bottom, top };
}

function span(values, least = 0) {
  const seen = values.filter((value) => value !== null && Number.isFinite(value));
  if (!seen.length) return [0, 1];
  let low = Math.min(...seen), high = Math.max(...seen);
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const room = 0.04 * (high - low);
  return [least === 0 && low >= 0 && low < 0.4 * high ? 0 : low - room, high + room];
}

function path(points, x, y) {
  let text = "", open = false;
  for (const [a, b] of points) {
    if (b === null || !Number.isFinite(b)) { open = false; continue; }
    text += `${open ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`; open = true;
  }
  return text;
}

// chart: {title, x, series: [{name, values, low?, high?, place?}]}; place: the number of its colour, where that is not its own
function lineChart(chart, { xLabel = "epoch", offset = 1, marked = null, markedName = "", yLabel = "" } = {}) {
  const xs = chart.x.map((value) => value + offset);
  const all = chart.series.flatMap((one) => [...one.values, ...(one.low ?? []), ...(one.high ?? [])]);
  const whole = ticks(xs[0], Math.max(xs.at(-1), xs[0] + 1), 6).filter(Number.isInteger);
  const plane = axes([xs[0], xs.at(-1) === xs[0] ? xs[0] + 1 : xs.at(-1)], span(all), { xLabel, yLabel, xTicks: whole });
  if (marked !== null) plane.svg.append(draw("line", { x1: plane.x(marked + offset), x2: plane.x(marked + offset), y1: plane.top, y2: plane.bottom, class: "mark" }));
  const entries = [];
  chart.series.forEach((one, place) => {
    const number = one.place ?? place, color = (one.place === undefined && KIND_COLORS[one.name]) || COLORS[number % COLORS.length];
    const points = one.values.map((value, at) => [xs[at], value]).filter(([, value]) => value !== null);
    if (one.low) {
      const known = one.low.map((value, at) => at).filter((at) => one.low[at] !== null);
      const edge = [...known.map((at) => [xs[at], one.low[at]]), ...known.reverse().map((at) => [xs[at], one.high[at]])];
      plane.svg.append(draw("path", { d: path(edge, plane.x, plane.y), style: `fill:${color};opacity:.18` }));
    }
    plane.svg.append(draw("path", { d: path(points, plane.x, plane.y), class: "line", style: `stroke:${color}`, "stroke-dasharray": number >= COLORS.length ? "5 3" : "none" }));
    if (points.length < 3) for (const [a, b] of points) plane.svg.append(draw("circle", { cx: plane.x(a), cy: plane.y(b), r: 3, style: `fill:${color}` }));
    entries.push([one.name, color]);
  });
  const note = marked !== null ? `Dotted: ${markedName}.` : undefined;
  return figure(chart.title, plane.svg, entries, note, chart.series[0].place === undefined ? 2 : 1);
}

function histogramChart(title, data, threshold, xLabel) {
  const kinds = ["all", "clean", "corrupt"].filter((kind) => data[kind]);
  const high = Math.max(...kinds.flatMap((kind) => data[kind]), 1);
  const plane = axes([data.edges[0], data.edges.at(-1)], [0, high * 1.05], { xLabel, yLabel: "samples" });
  for (const kind of kinds) data[kind].forEach((count, at) => {
    if (!count) return;
    const [a, b] = [plane.x(data.edges[at]), plane.x(data.edges[at + 1])];
    plane.svg.append(draw("rect", { x: a, width: Math.max(b - a - 0.6, 0.6), y: plane.y(count), height: plane.bottom - plane.y(count), style: `fill:${KIND_COLORS[kind]};opacity:${kinds.length > 1 ? 0.65 : 0.9}` }));
  });
  if (threshold !== null) plane.svg.append(draw("line", { x1: plane.x(threshold), x2: plane.x(threshold), y1: plane.top, y2: plane.bottom, class: "mark", id: "threshold-mark" }));
  return figure(title, plane.svg, kinds.length > 1 ? kinds.map((kind) => [`${kind} labels`, KIND_COLORS[kind]]) : []);
}

function barChart(title, names, series, { xLabel = "", yLabel = "" } = {}) {
  const kinds = Object.keys(series);
  const total = names.map((_, at) => kinds.reduce((sum, kind) => sum + Math.max(series[kind][at] ?? 0, 0), 0));
  const lowest = Math.min(0, ...kinds.flatMap((kind) => series[kind].map((value) => value ?? 0)));
  const every = Math.ceil(names.length / 14), long = names.some((name) => String(name).length > 5);
  const plane = axes([0, names.length], [lowest * 1.05, Math.max(...total, lowest < 0 ? 0 : 1e-9) * 1.05], { xLabel: long ? "" : xLabel, yLabel, xTicks: [] });
  const base = names.map(() => 0), width = Math.max(plane.x(1) - plane.x(0) - 2, 0.8);
  for (const kind of kinds) series[kind].forEach((value, at) => {
    if (!value) return;
    const [from, to] = [plane.y(base[at]), plane.y(base[at] + value)];
    const bar = draw("rect", { x: plane.x(at) + 1, width, y: Math.min(from, to), height: Math.abs(to - from), style: `fill:${KIND_COLORS[kind] ?? COLORS[0]}` });
    bar.append(draw("title", {}, `${names[at]}: ${number(value)}`));
    plane.svg.append(bar);
    base[at] += value;
  });
  names.forEach((name, at) => {
    if (at % every) return;
    const place = { x: plane.x(at + 0.5), y: plane.bottom + 14, "text-anchor": long ? "end" : "middle" };
    if (long) place.transform = `rotate(-35 ${place.x} ${place.y})`;
    plane.svg.append(draw("text", place, String(name).length > 14 ? `${String(name).slice(0, 13)}…` : name));
  });
  if (long) plane.svg.setAttribute("viewBox", "0 0 400 260");
  return figure(title, plane.svg, kinds.length > 1 ? kinds.map((kind) => [`${kind} labels`, KIND_COLORS[kind]]) : []);
}

function heatChart(chart) {
  const rows = chart.values.length, columns = chart.columns.length;
  const longest = (names) => Math.min(Math.max(...names.map((name) => String(name).length)), 12) * 6.2;
  const left = 24 + longest(chart.rows), tall = longest(chart.columns) > 24, head = 20 + (tall ? longest(chart.columns) * 0.8 : 8);
  const right = tall ? 366 : 398;  // slanted names reach beyond the last column
  const cell = Math.max((right - left) / columns, 1), high = Math.min(cell, 40);
  const svg = draw("svg", { viewBox: `0 0 400 ${(head + high * rows + 4).toFixed(0)}` });
  const seen = chart.values.flat().filter((value) => value !== null);
  const [low, top] = [Math.min(0, ...seen), Math.max(...seen, 1e-12)];
  const every = Math.ceil(rows / 30);
  const cut = (name) => (String(name).length > 12 ? `${String(name).slice(0, 11)}…` : String(name));
  chart.values.forEach((line, row) => line.forEach((value, column) => {
    const share = value === null ? 0 : Math.sqrt((value - low) / ((top - low) || 1));
    const [x, y] = [left + column * cell, head + row * high];
    const box = draw("rect", { x, y, width: cell + 0.3, height: high + 0.3, style: `fill:rgba(var(--heat),${(0.04 + 0.9 * share).toFixed(3)})` });
    box.append(draw("title", {}, `${chart.down} ${chart.rows[row]}, ${chart.across} ${chart.columns[column]}: ${number(value)}`));
    svg.append(box);
    if (columns <= 12 && value !== null) svg.append(draw("text", { x: x + cell / 2, y: y + high / 2 + 3.5, "text-anchor": "middle", style: `font-size:${cell < 26 ? 8 : 9.5}px;fill:${share > 0.62 ? "var(--on-accent)" : "var(--ink)"}` }, value.toFixed(2).replace(/^0(?=\.)/, "")));
  }));
  chart.rows.forEach((name, row) => { if (row % every === 0) svg.append(draw("text", { x: left - 5, y: head + (row + 0.5) * high + 4, "text-anchor": "end" }, cut(name))); });
  chart.columns.forEach((name, column) => {
    if (column % every) return;
    const place = { x: left + (column + 0.5) * cell, y: head - 5, "text-anchor": tall ? "start" : "middle" };
    if (tall) place.transform = `rotate(-50 ${place.x} ${place.y})`;
    svg.append(draw("text", place, cut(name)));
  });
  svg.append(draw("text", { x: (left + right) / 2, y: 11, "text-anchor": "middle" }, `${chart.across} →`));
  svg.append(draw("text", { x: -(head + high * rows / 2), y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, `← ${chart.down}`));
  return figure(chart.title, svg);
}
