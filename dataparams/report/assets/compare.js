const data = JSON.parse(document.getElementById("data").textContent);

function fixed(value, digits) { return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"); }
function signed(value, digits) { return `${value > 0 ? "+" : ""}${fixed(value, digits)}`; }

// ---- tables that sort by a click on a heading ----------------------------------------------------------------------------
function table(caption, headings, rows) {  // a row: [{text, small?, value, link?}]
  const body = make("tbody");
  const fill = (order) => body.replaceChildren(...order.map((row) => make("tr", {}, ...row.map((cell, at) => {
    const content = cell.link ? make("a", { href: cell.link }, cell.text) : cell.text;
    return make(at === 0 ? "th" : "td", at === 0 ? { scope: "row" } : {}, content, cell.small ? make("small", {}, cell.small) : null);
  }))));
  const heads = headings.map((heading, at) => {
    const button = make("button", { type: "button" }, heading.title), head = make("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      const best = heading.good === "low" ? "ascending" : "descending", now = head.getAttribute("aria-sort");
      const next = now === best ? (best === "ascending" ? "descending" : "ascending") : at === 0 && now === null ? "ascending" : best;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const key = (row) => row[at].value;
      fill([...rows].sort((a, b) => {
        if (key(a) === null || key(b) === null) return (key(a) === null) - (key(b) === null);  // what is missing comes last
        return sign * (typeof key(a) === "string" ? key(a).localeCompare(key(b), "en", { numeric: true }) : key(a) - key(b));
      }));
    });
    return head;
  });
  fill(rows);
  return make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": caption }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
}
function cellOf(cell, { digits }) {
  const spread = cell.std === null ? "" : ` ± ${fixed(cell.std, digits)}`;
  let small = null;
  if (cell.difference !== null && cell.difference !== undefined) {
    small = signed(cell.difference, digits) + (cell.low === null ? "" : ` (${signed(cell.low, digits)} to ${signed(cell.high, digits)})`);
  }
  return { text: cell.mean === null ? "–" : `${fixed(cell.mean, digits)}${spread}`, small, value: cell.mean };
}
function summaryTable(section) {
  const headings = [{ title: "method" }, { title: "seeds" }, ...section.columns];
  const rows = section.lines.map((line) => [
    { text: line.method, value: line.method }, { text: String(line.seeds), value: line.seeds },
    ...line.cells.map((cell, at) => cellOf(cell, section.columns[at])),
  ]);
  return table(`${section.title}: methods`, headings, rows);
}
function runTable(section) {
  const headings = [{ title: "method" }, { title: "seed", good: "low" }, ...section.columns, { title: "folder" }];
  const rows = section.runs.map((run) => [
    { text: run.method, value: run.method }, { text: String(run.seed), value: run.seed },
    ...run.values.map((value, at) => ({ text: fixed(value, section.columns[at].digits), value })),
    { text: run.folder, value: run.folder, link: run.page === null ? null : run.page.split("/").map(encodeURIComponent).join("/") },
  ]);
  return make("details", {}, make("summary", {}, `The ${section.runs.length} runs`), table(`${section.title}: runs`, headings, rows));
}

// ---- differences to the baseline: a point and an interval a method ------------------------------------------------------
function differenceChart(chart) {
  const values = chart.lines.flatMap((line) => [line.difference, line.low, line.high, 0]);
  const longest = Math.min(Math.max(...chart.lines.map((line) => line.name.length)), 22), left = 12 + 6.4 * longest, right = 390;
  const [low, high] = span(values, 1), high_y = 10 + 26 * chart.lines.length;
  const svg = draw("svg", { viewBox: `0 0 400 ${high_y + 38}` }), x = (value) => left + (right - left) * (value - low) / (high - low);
  for (const value of ticks(low, high)) {
    svg.append(draw("line", { x1: x(value), x2: x(value), y1: 4, y2: high_y, class: value === 0 ? "mark" : "axis" }));
    svg.append(draw("text", { x: x(value), y: high_y + 15, "text-anchor": "middle" }, short(value)));
  }
  chart.lines.forEach((line, place) => {
    const y = 22 + 26 * place, name = line.name.length > 22 ? `${line.name.slice(0, 21)}…` : line.name;
    svg.append(draw("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, name));
    if (line.low !== null) svg.append(draw("line", { x1: x(line.low), x2: x(line.high), y1: y, y2: y, style: "stroke:var(--clean);stroke-width:2.5" }));
    if (line.difference !== null) svg.append(draw("circle", { cx: x(line.difference), cy: y, r: 4.5, style: "fill:var(--clean)" }));
  });
  svg.append(draw("text", { x: (left + right) / 2, y: high_y + 32, "text-anchor": "middle" }, `difference to ${data.baseline}`));
  return figure(chart.title, svg);
}

document.getElementById("title").textContent = data.title;
document.getElementById("paragraph").textContent = data.paragraph;
const paired = data.sections.some((section) => section.differences.length > 0);
document.getElementById("reading").textContent = [
  "Mean ± standard deviation over seeds.",
  paired ? `Below it the difference to ${data.baseline}, paired by seed and settings, with the 95% confidence interval of its mean (Student's t; none for one seed). With many methods some intervals miss zero by chance.` : "",
  "best: the epoch chosen on validation labels, last: the final one. Memory of a CPU run is that of the process so far, which in a sweep holds earlier jobs too.",
  "A click on a heading sorts.",
].join(" ");
for (const section of data.sections) {
  const drawn = [...section.differences.map(differenceChart), ...section.curves.map((curve) => lineChart(curve))];
  document.getElementById("sections").append(make("section", {},
    make("h2", {}, section.title), summaryTable(section), make("div", { class: "grid below" }, ...drawn), runTable(section)));
}
