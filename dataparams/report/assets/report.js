const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);

// ---- columns -----------------------------------------------------------------------------------------------------------
function decode(column) {
  if (column.type === "text") return column.data;
  const text = atob(column.data), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return { bool: () => bytes, int: () => new Int32Array(bytes.buffer), float: () => new Float32Array(bytes.buffer) }[column.type]();
}
const columns = new Map(data.columns.map((column) => [column.name, { type: column.type, values: decode(column) }]));
const index = columns.get("index").values, ids = columns.get("id")?.values ?? index, size = index.length;
const checked = new Uint8Array(size), hasMedia = Object.keys(data.media).length > 0;
const named = ids !== index && ids.some((id, row) => String(id) !== String(index[row]));
let view, score, shown = new Int32Array(0), active = 0;

function cell(name, row) {
  const { type, values } = columns.get(name), value = values[row];
  if (type === "bool") return Boolean(value);
  return type === "float" && !Number.isFinite(value) ? null : value;
}
function className(value) {
  if (value === null || value === -1) return "none";
  return view.classes ? view.classes[value] ?? String(value) : Number.isInteger(value) ? String(value) : number(value);
}

// ---- order and filters -------------------------------------------------------------------------------------------------
const orders = new Map(), ROWS = 2 ** 21;
// Numbers sort ten times faster than with a function that compares: a float's bits, made monotone, then the row in the low bits.
function ordered(one) {
  if (!orders.has(one.column)) {
    const values = columns.get(one.column).values, floats = new Float32Array(size), keys = new Float64Array(size);
    for (let row = 0; row < size; row++) floats[row] = Number.isFinite(values[row]) ? 0 - one.sign * values[row] : Infinity;
    const bits = new Uint32Array(floats.buffer);
    for (let row = 0; row < size; row++) keys[row] = ((bits[row] >>> 31 ? ~bits[row] : bits[row] | 0x80000000) >>> 0) * ROWS + row;
    orders.set(one.column, Int32Array.from(keys.sort(), (key) => key % ROWS));
  }
  return orders.get(one.column);
}
// The slider moves along ranks, not values: scores crowd at one end.
function threshold() {
  const at = Number(by("threshold").value);
  if (at === 0) return null;
  const order = ordered(score), values = columns.get(score.column).values;
  return values[order[Math.max(Math.ceil((1 - at / 1000) * size) - 1, 0)]];
}
function update(keepPlace = false) {
  const order = ordered(score), values = columns.get(score.column).values, limit = threshold(), reversed = by("direction").value === "best";
  const given = view.given ? columns.get(view.given).values : null, wanted = by("given").value === "" ? null : Number(by("given").value);
  const model = view.model ? columns.get(view.model).values : null, modelWanted = by("model").value === "" ? null : Number(by("model").value);
  const which = by("which").value, wrong = view.is_corrupt ? columns.get(view.is_corrupt).values : null;
  const flags = which === "issues" ? columns.get(view.is_label_issue).values : which === "wrong" ? wrong : null;
  const find = by("find").value.trim(), kept = new Int32Array(size);
  let count = 0;
  for (let place = 0; place < size; place++) {
    const row = order[reversed ? size - 1 - place : place];
    if (limit !== null && !(score.sign * values[row] >= score.sign * limit)) continue;
    if (wanted !== null && given[row] !== wanted) continue;
    if (modelWanted !== null && model[row] !== modelWanted) continue;
    if (which === "checked" && !checked[row]) continue;
    if (which === "disagree" && given[row] === model[row]) continue;
    if (flags && !flags[row]) continue;
    if (which === "right" && wrong[row]) continue;
    if (find && String(index[row]) !== find && !String(ids[row]).includes(find)) continue;
    kept[count++] = row;
  }
  shown = kept.subarray(0, count);
  if (!keepPlace) { by("list").scrollTop = 0; active = 0; }
  by("threshold-text").textContent = limit === null ? "all samples" : `${score.label} ${score.sign > 0 ? "≥" : "≤"} ${number(limit)}${quality(limit)}`;
  markThreshold(limit);
  layout();
  say();
}
function quality(limit) {
  const curve = score.detection;
  if (!curve || data.total !== size) return "";
  let at = curve.threshold.findIndex((value) => score.sign * value <= score.sign * limit + 1e-6);
  if (at < 0) at = curve.threshold.length - 1;
  return ` (precision ${curve.precision[at].toFixed(2)}, recall ${curve.recall[at].toFixed(2)})`;
}
function say() {
  const picked = checked.reduce((sum, one) => sum + one, 0), format = (value) => value.toLocaleString("en");
  by("count").textContent = `${format(shown.length)} of ${format(size)} samples shown, ${format(picked)} checked`;
  for (const id of ["export-csv", "export-json", "clear"]) by(id).disabled = picked === 0;
  by("check-shown").disabled = shown.length === 0;
}

// ---- the list: only what is in sight exists ------------------------------------------------------------------------------
const GAP = 10, LEAST = 210;
let across = 1, wide = LEAST, tall = 300;
const cards = new Map();
function layout() {
  const list = by("list"), room = list.clientWidth - GAP;
  across = Math.max(1, Math.floor(room / (LEAST + GAP)));
  wide = room / across - GAP;
  tall = (hasMedia ? 150 : 14) + 34 + 21 * labelRows().length + 20 * Math.min(numberRows().length, 7) + 30;
  by("spacer").style.height = `${Math.ceil(shown.length / across) * (tall + GAP) + GAP}px`;
  for (const card of cards.values()) card.remove();
  cards.clear();
  paint();
}
function paint() {
  const list = by("list"), first = Math.max(Math.floor(list.scrollTop / (tall + GAP)) - 1, 0) * across;
  const last = Math.min((Math.ceil((list.scrollTop + list.clientHeight) / (tall + GAP)) + 1) * across, shown.length);
  for (const [place, card] of cards) {  // the one with the focus stays, wherever it is
    if ((place < first || place >= last) && !card.contains(document.activeElement)) { card.remove(); cards.delete(place); }
  }
  for (let place = first; place < last; place++) {
    if (!cards.has(place)) {
      const made = card(place);
      cards.set(place, made);
      by("spacer").append(made);
    }
  }
}
function labelRows() {
  const learned = view.classes && !view.task && columns.has("soft_label") ? "soft_label" : null;
  return [["id", named ? "id" : null], ["given", view.given], ["model", view.model], ["learned", learned], ["right", view.true]].filter(([, name]) => name);
}
function labelText(name, row) { return name === "id" ? String(ids[row]) : className(cell(name, row)); }
function numberRows() {
  const labels = new Set(["index", "id", ...labelRows().map(([, name]) => name), view.given, view.true, view.model, view.is_corrupt, view.is_label_issue]);
  const others = data.views.filter((one) => one !== view).map((one) => one.task);
  const names = [...columns.keys()].filter((name) => !labels.has(name) && !name.endsWith("_last"));
  const own = names.filter((name) => !others.some((task) => name.endsWith(`_${task}`)) && !(view.task && name === "given_label"));
  const ranking = view.scores.map((each) => each.column).filter((name) => !name.endsWith("_last"));
  return [...new Set([score.column, ...ranking, ...own])];
}
function card(place) {
  const row = shown[place], texts = labelRows().map(([word, column]) => [word, labelText(column, row)]);
  const box = make("input", { type: "checkbox", tabIndex: place === active ? 0 : -1 });
  box.checked = checked[row] === 1;
  box.setAttribute("aria-label", `Sample ${index[row]}: ${texts.map((pair) => pair.join(" ")).join(", ")}`);
  const flagged = view.is_label_issue && cell(view.is_label_issue, row);
  const head = make("label", { class: "head" }, make("span", {}, `#${index[row]}`), flagged ? make("b", { class: "flag" }, "label issue") : null, box);
  const labels = make("dl", { class: "labels" });
  for (const [word, text] of texts) labels.append(make("dt", {}, word), make("dd", { title: text }, text));
  const numbers = make("dl", { class: "numbers" });
  for (const column of numberRows()) {
    const value = cell(column, row), kind = column === score.column ? "ranked" : "";
    const text = typeof value === "boolean" ? (value ? "yes" : "no") : typeof value === "string" ? value : number(value);
    numbers.append(make("dt", { class: kind, title: words(column) }, words(column)), make("dd", { class: kind }, text));
  }
  const card = make("div", { class: `sample${hasMedia ? "" : " no-media"}${checked[row] ? " checked" : ""}${place === active ? " active" : ""}`, role: "listitem", id: `sample-${place}` }, head, medium(row), labels, numbers);
  card.style.cssText = `left:${GAP + (place % across) * (wide + GAP)}px;top:${GAP + Math.floor(place / across) * (tall + GAP)}px;width:${wide}px;height:${tall}px`;
  box.addEventListener("change", () => check(place, box.checked));
  box.addEventListener("focus", () => activate(place, false));
  return card;
}
function medium(row) {
  const found = data.media[index[row]];
  if (!found) return make("div", { class: "medium none" }, "no picture in this page");
  if (found.kind === "image") {
    const picture = make("img", { src: found.src, alt: `sample ${index[row]}`, draggable: false });
    picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth <= 64));
    return make("div", { class: "medium" }, picture);
  }
  if (found.kind === "text") return make("div", { class: "medium" }, make("p", {}, found.text));
  const svg = draw("svg", { viewBox: "0 0 192 60", role: "img", "aria-label": "waveform", preserveAspectRatio: "none", height: 62 });
  const highest = Math.max(...found.peaks, 0.02), step = 192 / found.peaks.length;
  found.peaks.forEach((peak, at) => svg.append(draw("rect", { x: at * step, width: step * 0.7, y: 30 - 28 * peak / highest, height: Math.max(56 * peak / highest, 0.8), style: "fill:var(--clean)" })));
  svg.style.width = "100%";
  const sound = make("audio", { controls: true, src: found.src, preload: "none" });
  return make("div", { class: "medium" }, make("div", { class: "sound" }, svg, sound));
}
function check(place, value) {
  checked[shown[place]] = value ? 1 : 0;
  const card = cards.get(place);
  if (card) { card.classList.toggle("checked", value); card.querySelector("input").checked = value; }
  say();
}
// One sample at a time can be reached with Tab; arrow keys move on from it.
function activate(place, move = true) {
  const before = cards.get(active);
  active = Math.min(Math.max(place, 0), shown.length - 1);
  if (move) {
    const list = by("list"), top = Math.floor(active / across) * (tall + GAP);
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + tall + 2 * GAP > list.scrollTop + list.clientHeight) list.scrollTop = top + tall + 2 * GAP - list.clientHeight;
    paint();
  }
  if (before && before !== cards.get(active)) { before.classList.remove("active"); before.querySelector("input").tabIndex = -1; }
  const card = cards.get(active);
  card.classList.add("active");
  card.querySelector("input").tabIndex = 0;
  if (move) card.querySelector("input").focus({ preventScroll: true });
}
by("list").addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
by("list").addEventListener("keydown", (event) => {
  if (event.target.type !== "checkbox") return;
  const page = across * Math.max(Math.floor(by("list").clientHeight / (tall + GAP)), 1);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (!(event.key in steps)) return;
  activate(active + steps[event.key]);
  event.preventDefault();
});
let lastWidth = 0;
new ResizeObserver(() => { if (by("list").clientWidth !== lastWidth) { lastWidth = by("list").clientWidth; layout(); } }).observe(by("list"));

// ---- export ----------------------------------------------------------------------------------------------------------------
function record(row) {
  const one = { index: index[row], id: ids[row] };
  for (const each of data.views) {
    const tail = each.task ? `_${each.task}` : "";
    for (const [word, name] of [["given", each.given], ["model", each.model]]) {
      if (!name) continue;
      one[name] = cell(name, row);
      if (each.classes) one[`${word}_name${tail}`] = each.classes[one[name]] ?? "";
    }
    if (each.is_label_issue) one[each.is_label_issue] = cell(each.is_label_issue, row);
    for (const own of each.scores) if (own.base === own.column) one[own.column] = cell(own.column, row);
    one[`new_label${tail}`] = "";  // to be filled in
  }
  return one;
}
function quoted(value) {
  let text = value === null ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;  // a spreadsheet would run it as a formula
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
function records() {
  const found = [];
  for (const row of ordered(data.views[0].scores[0] ?? score)) if (checked[row]) found.push(record(row));
  return found;
}
function save(name, kind, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
by("export-csv").addEventListener("click", () => {
  const lines = records(), names = Object.keys(lines[0]);
  save("checked.csv", "text/csv", [names.map(quoted), ...lines.map((one) => names.map((name) => quoted(one[name])))].map((line) => line.join(",")).join("\n") + "\n");
});
by("export-json").addEventListener("click", () => save("checked.json", "application/json", JSON.stringify(records(), null, 1) + "\n"));
by("check-shown").addEventListener("click", () => { for (const row of shown) checked[row] = 1; update(true); });
by("clear").addEventListener("click", () => { checked.fill(0); update(true); });

// ---- charts ----------------------------------------------------------------------------------------------------------------
function charts() {
  const grid = by("chart-grid"), best = data.marked_epoch;
  const drawn = [];
  if (score.histogram) drawn.push(histogramChart(`Samples by ${score.label}`, score.histogram, null, score.label));
  if (score.detection) {
    const curve = score.detection, points = { title: `Suspects by ${score.label}: precision and recall`, x: curve.flagged, series: [{ name: "precision", values: curve.precision }, { name: "recall", values: curve.recall }] };
    const made = lineChart(points, { xLabel: "samples flagged, worst first", offset: 0 });
    made.append(make("p", { class: "quiet" }, `Against the known wrong labels; area under the ROC curve ${curve.auroc.toFixed(3)}.`));
    drawn.push(made);
  }
  if (view.arrivals) {
    const { rounds, ...kinds } = view.arrivals;
    drawn.push(barChart("What a selection took in, and when", rounds, kinds, { xLabel: "epoch at whose start the samples came in", yLabel: "samples" }));
  }
  for (const curve of data.curves) drawn.push(lineChart(curve, { marked: best, markedName: best === null ? "" : `best epoch (${best + 1})` }));
  for (const bars of view.by_class) drawn.push(barChart(`${bars.title} by given label`, bars.names, { all: bars.values }, { xLabel: "given label" }));
  for (const heat of [...view.heat, ...data.matrices]) drawn.push(heatChart(heat));
  grid.replaceChildren(...drawn);
}
function markThreshold(limit) {
  const svg = by("chart-grid").querySelector("figure svg"), edges = score.histogram?.edges;
  if (!svg || !edges) return;
  svg.querySelector("#threshold-mark")?.remove();
  if (limit === null) return;
  const x = 46 + 346 * Math.min(Math.max((limit - edges[0]) / (edges.at(-1) - edges[0]), 0), 1);
  svg.append(draw("line", { x1: x, x2: x, y1: 8, y2: 190, class: "mark", id: "threshold-mark" }));
}

// ---- start -----------------------------------------------------------------------------------------------------------------
function options(select, entries) { select.replaceChildren(...entries.map(([value, text]) => make("option", { value: String(value) }, text))); }
function open(one) {
  view = one;
  score = view.scores[0];
  options(by("rank"), view.scores.map((each, at) => [at, each.label]));
  const classes = (view.classes ?? []).map((name, at) => [at, String(at) === name ? name : `${at}: ${name}`]);
  options(by("given"), [["", "all"], ...classes]);
  options(by("model"), [["", "all"], ...classes]);
  for (const label of document.querySelectorAll(".class-filter")) label.hidden = !view.classes;
  by("model-filter").hidden = !(view.classes && view.model);
  options(by("which"), [["all", "all samples"], ...(view.is_label_issue ? [["issues", "label issues"]] : []), ...(view.model && view.classes ? [["disagree", "model disagrees"]] : []), ...(view.is_corrupt ? [["wrong", "known wrong"], ["right", "known right"]] : []), ["checked", "checked only"]]);
  by("threshold").value = 0;
  charts();
  update();
}
by("rank").addEventListener("change", () => { score = view.scores[Number(by("rank").value)]; by("threshold").value = 0; charts(); update(); });
for (const id of ["direction", "given", "model", "which"]) by(id).addEventListener("change", () => update());
for (const id of ["find", "threshold"]) by(id).addEventListener("input", () => update());
by("tools").addEventListener("submit", (event) => event.preventDefault());
by("title").textContent = data.title;
by("paragraph").textContent = data.paragraph;
if (data.note || size < data.total) {
  by("held").hidden = false;
  by("held").textContent = [size < data.total ? `The page holds the ${size.toLocaleString("en")} most suspicious of ${data.total.toLocaleString("en")} samples; all are in rows.parquet beside it. The charts count all.` : "", data.note ?? ""].join(" ").trim();
}
if (data.views.length > 1) {
  const tabs = by("tabs");
  tabs.hidden = false;
  data.views.forEach((one, at) => {
    const tab = make("button", { type: "button", role: "tab", id: `tab-${at}`, "aria-controls": "samples" }, words(one.task));
    tab.addEventListener("click", () => {
      [...tabs.children].forEach((each) => { each.setAttribute("aria-selected", String(each === tab)); each.tabIndex = each === tab ? 0 : -1; });
      open(one);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { const next = tabs.children[(at + step + data.views.length) % data.views.length]; next.focus(); next.click(); }
    });
    tabs.append(tab);
  });
  tabs.children[0].click();
} else open(data.views[0]);
