"use strict";
// Draws the plots and the sample browser of a report from the JSON in the page. All text is inserted as text, never as HTML.
(() => {
const root = document.documentElement;
let words = JSON.parse(document.getElementById("words").textContent);
const say = (phrase) => words[phrase] || phrase;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const COLORS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
let plots = [];
let printing = false;

// --- numbers

function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return trim(value / limit) + unit;
  return trim(value);
}
function trim(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}
function whole(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size >= 1e5 ? short(value) : size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
}
const percent = (share) => (share === null || share === undefined ? "–" : trim(100 * share) + " %");

// --- plots

const controlOf = (id) => document.getElementById(id);
const axisName = () => { const control = document.getElementById("axis"); return control ? control.value : null; };

function colorOf(spec, i) {
  const series = spec.series[i];
  return css(COLORS[(series.color === undefined ? i : series.color) % COLORS.length]);
}

function clear(figure) {
  const kept = figure.plot;
  if (kept) kept.destroy();
  figure.plot = null;
  figure.querySelector(".canvas").replaceChildren();
  figure.querySelector(".legend").replaceChildren();
}

function draw(figure) {
  clear(figure);
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector(".canvas");
  canvas.classList.toggle("tall", Boolean(spec.tall));
  if (!spec.series.some((series) => series.y.some((value) => value !== null))) {
    canvas.append(make("div", "empty", say("no data")));
    figure.dataset.drawn = "empty";
    return;
  }
  const off = new Set((figure.dataset.off || "").split("|").filter(Boolean));
  const width = printing ? 640 : Math.max(240, canvas.clientWidth);
  const built = spec.kind === "bars" ? barsOf(spec) : linesOf(spec);
  const options = {
    width,
    height: printing ? 200 : spec.tall ? 280 : 220,
    legend: { show: false },
    padding: [spec.marks && spec.marks.length ? 20 : 12, 20, 0, 0],
    ...built.options,
  };
  options.series.slice(1).forEach((series) => { series.show = !off.has(series.label); });
  const plot = new uPlot(options, built.data, canvas);
  figure.plot = plot;
  plot.spec = spec;
  const xs = plot.data[0], all = spec.extent && spec.extent[built.axis];
  plot.extent = all || [xs[0], xs[xs.length - 1]];
  if (all) plot.setScale("x", { min: all[0], max: all[1] });
  plot.isReady = true;
  plots.push(plot);
  addLegend(figure, spec, plot, off);
  addTip(figure, spec, plot, built);
  addTouch(plot);
  figure.dataset.drawn = "yes";
}

function look(options) {
  return {
    stroke: css("--muted"), font: "11px system-ui, sans-serif", ticks: { show: false }, gap: 4,
    grid: { stroke: css("--line"), width: 1 }, labelFont: "11px system-ui, sans-serif", labelSize: 16, labelGap: 2, ...options,
  };
}

function yAxis(spec, series) {
  const format = spec.share ? (value) => trim(100 * value) + "%" : short;
  return look({ size: 48, label: (spec.share ? say("share") : spec.unit) || undefined, values: (_, splits) => splits.map((value) => (value === null ? "" : format(value))), space: 34 });
}

function barsOf(spec) {
  const number = spec.edges.length - 1;
  const single = spec.series.length === 1;
  const xs = Array.from({ length: number + (single ? 0 : 1) }, (_, i) => i);
  const data = [xs, ...spec.series.map((series) => (single ? series.y : [...series.y, series.y[number - 1]]))];
  const ticks = spec.ticks.map(([edge, label]) => [place(spec.edges, edge), label]);
  const series = spec.series.map((one, i) => {
    const color = colorOf(spec, i);
    return {
      label: one.name, stroke: color, width: single ? 0 : 1.75, fill: color + (single ? "d0" : "26"),
      paths: single ? uPlot.paths.bars({ size: [1, 200], align: 1, gap: 1, radius: 0.12 }) : uPlot.paths.stepped({ align: 1 }),
      points: { show: false },
    };
  });
  return {
    data,
    options: {
      series: [{}, ...series],
      scales: { x: { time: false, range: [0, number] }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.06 : 1] } },
      axes: [
        look({ splits: () => ticks.map((tick) => tick[0]), values: () => ticks.map((tick) => tick[1]), size: 28, label: spec.x || undefined, grid: { show: false } }),
        yAxis(spec),
      ],
      cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
      hooks: { draw: [(plot) => drawMarks(plot, spec.marks.map(([at, label]) => ({ at: place(spec.edges, at), label })))] },
    },
  };
}

// The x position of a value in a histogram whose bins are all drawn one unit wide: 0 at edges[0], 1 at edges[1], and so on.
// Within a bin the scale is logarithmic if the lower edge is positive, else linear.
function place(edges, value) {
  if (value <= edges[0]) return 0;
  for (let i = 0; i + 1 < edges.length; i++)
    if (value < edges[i + 1])
      return i + (edges[i] > 0 && edges[i + 1] / edges[i] > 1.01 && value > 0
        ? Math.log(value / edges[i]) / Math.log(edges[i + 1] / edges[i]) : (value - edges[i]) / (edges[i + 1] - edges[i]));
  return edges.length - 1;
}

// The exponential moving average of a curve, corrected for its beginning; it starts anew after a gap (null).
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) { sum = total = 0; return null; }
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + 1 - weight;
    return sum / total;
  });
}

// Draws a curve's parts between its gaps (null) one by one. uPlot cuts gaps out of one line, which leaves those narrower
// than a pixel.
function parts(plot, index, first, last) {
  const linear = uPlot.paths.linear(), values = plot.data[index], stroke = new Path2D();
  for (let i = first, begin = first; i <= last + 1; i++) {
    if (i <= last && values[i] !== null) continue;
    if (values.slice(begin, i).some((value) => value !== undefined)) stroke.addPath(linear(plot, index, begin, i - 1).stroke);
    begin = i + 1;
  }
  return { stroke, fill: null, clip: null, band: null, gaps: null, flags: 1 };
}

function linesOf(spec) {
  const axis = axisName() in (spec.axes || {}) ? axisName() : Object.keys(spec.axes)[0];
  const about = spec.axes[axis];
  const tables = [], series = [], bands = [];
  const weight = spec.group && controlOf("smooth") ? Number(controlOf("smooth").value) : 0;
  const isLog = spec.logy || (spec.group && controlOf("log") && controlOf("log").checked && spec.series.every((one) => one.y.every((value) => value === null || value > 0)));
  spec.series.forEach((one, i) => {
    const color = colorOf(spec, i);
    const xs = spec.scatter || one.x[axis];
    const table = [xs, weight ? smoothed(one.y, weight) : one.y];
    const style = { label: one.name, stroke: color, width: one.faint ? 1 : 1.9, spanGaps: false, paths: parts,
      dash: one.dash ? [5, 4] : undefined, points: { show: Boolean(one.points), size: 5, fill: color, stroke: color } };
    if (spec.scatter) Object.assign(style, { paths: () => null, points: { show: true, size: 4, width: 0, fill: color + "90" } });
    series.push(style);
    if (one.low) {
      const at = series.length;
      table.push(one.high, one.low);
      const hidden = { label: one.name, stroke: "transparent", width: 0, spanGaps: false, points: { show: false }, band: true };
      series.push({ ...hidden }, { ...hidden });
      bands.push({ series: [at + 1, at + 2], fill: color + "22" });
    }
    tables.push(table);
  });
  const data = spec.scatter ? [spec.scatter, ...spec.series.map((one) => one.y)] : tables.length === 1 ? tables[0] : uPlot.join(tables, tables.map((table) => table.map(() => 2))); // 2: a null parts a curve also where only other curves have points
  const marks = (spec.marks || []).map((mark) => ({ ...mark, at: mark.x[axis] })).filter((mark) => mark.at !== null && mark.at !== undefined);
  const sync = spec.group ? { key: spec.group, setSeries: false, scales: ["x", null] } : undefined;
  return {
    data, axis, marks,
    options: {
      series: [{}, ...series], bands,
      scales: { x: { time: false, distr: spec.logx ? 3 : 1 }, y: { distr: isLog ? 3 : 1, ...(spec.floor !== undefined && !isLog ? { range: (_, low, high) => [Math.min(spec.floor, low), high > spec.floor ? high * 1.05 : spec.floor + 1] } : {}) } },
      axes: [
        look({ size: 28, label: about.label || undefined, values: (_, splits) => splits.map((value) => (value === null ? "" : about.hours ? hours(value) : short(value))), space: 56 }),
        yAxis(spec),
      ],
      cursor: { drag: { x: true, y: false, dist: 6 }, y: false, sync, points: { size: 6 } },
      hooks: { draw: [(plot) => drawMarks(plot, marks)], setScale: [(plot, key) => key === "x" && zoomAlike(plot)] },
    },
  };
}

function hours(value) {
  if (value === 0) return "0";
  if (value < 1 / 60) return trim(value * 3600) + "s";
  return value < 1 ? trim(value * 60) + "m" : trim(value) + "h";
}

// Draws vertical marks, {at, label, kind, color, said}, at x = at. A mark of kind "tick" is a short line at the bottom. Any
// other is a dashed line with its label above; a mark of kind "event" whose label would overlap another is only a short
// line at the top.
function drawMarks(plot, marks) {
  const context = plot.ctx, ratio = devicePixelRatio || 1, box = plot.bbox;
  const line = (x, top, bottom, dash, alpha) => {
    context.setLineDash(dash.map((length) => length * ratio));
    context.globalAlpha = alpha;
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, bottom);
    context.stroke();
    context.globalAlpha = 1;
  };
  context.save();
  context.font = `${10.5 * ratio}px system-ui, sans-serif`;
  context.textAlign = "center";
  const taken = [];
  let tick = -Infinity;
  for (const mark of [...marks].sort((one, other) => (other.kind !== "event") - (one.kind !== "event") || one.at - other.at)) {
    if (mark.at < plot.scales.x.min || mark.at > plot.scales.x.max) continue;
    const x = Math.round(plot.valToPos(mark.at, "x", true)), bottom = box.top + box.height;
    context.strokeStyle = context.fillStyle = css(mark.color === undefined ? "--muted" : COLORS[mark.color % COLORS.length]);
    context.lineWidth = ratio;
    if (mark.kind === "tick") {
      if (x - tick < 3 * ratio) continue;
      tick = x;
      context.lineWidth = 1.5 * ratio;
      line(x, bottom - 7 * ratio, bottom, [], 0.8);
      continue;
    }
    const half = context.measureText(mark.label).width / 2 + 3 * ratio;
    const meets = (at) => taken.find(([begin, end]) => at - half < end && at + half > begin);
    let middle = Math.min(Math.max(x, box.left + half), plot.width * ratio - half);
    if (mark.kind === "stage" && meets(middle)) middle = Math.min(meets(middle)[1] + half, plot.width * ratio - half);
    const isFree = !meets(middle);
    if (isFree) {
      context.fillText(mark.label, middle, box.top - 5 * ratio);
      taken.push([middle - half, middle + half]);
    }
    if (isFree || mark.kind !== "event") line(x, box.top, bottom, [3, 3], 0.65);
    else line(x, box.top, box.top + 5 * ratio, [], 0.65);
  }
  context.restore();
}

let isZooming = false;
function zoomAlike(plot) {
  if (!plot.isReady) return;
  const { min, max } = plot.scales.x;
  const figure = plot.root.closest("figure");
  if (figure) {
    const isZoomed = min > plot.extent[0] || max < plot.extent[1];
    const button = figure.querySelector(".zoomed");
    if (button) button.hidden = !isZoomed;
  }
  if (isZooming || !plot.spec || !plot.spec.group) return;
  isZooming = true;
  for (const other of plots)
    if (other !== plot && other.spec.group === plot.spec.group && (other.scales.x.min !== min || other.scales.x.max !== max))
      other.setScale("x", { min, max });
  isZooming = false;
}

function addLegend(figure, spec, plot, off) {
  const legend = figure.querySelector(".legend");
  if (spec.series.length > 1 || spec.legend)
    spec.series.forEach((one, i) => {
      const button = make("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!off.has(one.name)));
      const swatch = make("i", one.dash ? "dash" : spec.kind === "bars" ? "box" : "");
      swatch.style.setProperty("--swatch", colorOf(spec, i));
      button.append(swatch, make("span", "", one.name));
      button.onclick = () => {
        const show = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(show));
        plot.series.forEach((series, at) => { if (at && series.label === one.name) plot.setSeries(at, { show }); });
        if (show) off.delete(one.name); else off.add(one.name);
        figure.dataset.off = [...off].join("|");
      };
      legend.append(button);
    });
  if (spec.kind === "lines") {
    const button = make("button", "zoomed", "⤢ " + say("reset zoom"));
    button.type = "button";
    button.hidden = true;
    button.onclick = () => plot.setScale("x", { min: plot.extent[0], max: plot.extent[1] });
    legend.append(button);
  }
}

function addTip(figure, spec, plot, built) {
  const tip = make("div", "tip");
  plot.over.append(tip);
  const hide = () => { tip.style.display = "none"; };
  plot.over.addEventListener("mouseleave", hide);
  plot.hooks.setCursor = [(self) => {
    const { left, top, event } = self.cursor;
    if (left < 0 || left === undefined || (event && !self.over.contains(event.target))) return hide();
    const i = spec.kind === "bars" ? Math.floor(self.posToVal(left, "x")) : self.cursor.idx;
    if (i === null || i === undefined || i < 0 || i >= (spec.kind === "bars" ? spec.edges.length - 1 : self.data[0].length)) return hide();
    tip.replaceChildren(make("b", "", spec.kind === "bars" ? range(spec, i) : about(spec, built.axis, self.data[0][i])));
    self.series.forEach((series, at) => {
      if (!at || !series.show || series.band) return;
      const value = spec.kind === "bars" ? self.data[at][i] : nearest(self.data[at], i);
      if (value === null || value === undefined) return;
      const line = make("div"), swatch = make("i");
      swatch.style.background = typeof series.stroke === "function" ? series.stroke(self, at) : series.stroke;
      line.append(swatch, make("span", "", (self.series.length > 2 ? series.label + ": " : "") + (spec.share ? percent(value) : whole(value)) + (spec.kind === "bars" && spec.unit ? " " + spec.unit : "")));
      tip.append(line);
    });
    const near = (built.marks || []).filter((mark) => mark.said && Math.abs(self.valToPos(mark.at, "x") - left) < 5);
    for (const mark of near.slice(0, 3)) tip.append(make("div", "", `${mark.label || "╵"} ${mark.said}`));
    tip.style.display = "block";
    const x = left + 14 + tip.offsetWidth > self.over.clientWidth ? left - tip.offsetWidth - 14 : left + 14;
    tip.style.left = Math.max(-40, x) + "px";
    tip.style.top = Math.min(Math.max(0, (top > 0 ? top : 0) - 10), Math.max(0, self.over.clientHeight - tip.offsetHeight)) + "px";
  }];
}

function nearest(values, i) {
  for (let away = 0; away < 40; away++) {
    if (values[i - away] !== null && values[i - away] !== undefined) return values[i - away];
    if (values[i + away] !== null && values[i + away] !== undefined) return values[i + away];
  }
  return null;
}

function range(spec, i) {
  const [low, high] = [spec.edges[i], spec.edges[i + 1]];
  if (spec.names) return spec.names[i];
  if (Number.isInteger(low) && Number.isInteger(high)) return high - 1 > low ? `${whole(low)} – ${whole(high - 1)}` : whole(low);
  return `${trim(low)} – ${trim(high)}`;
}

function about(spec, axis, value) {
  const { label, hours: isHours } = spec.axes[axis];
  return isHours ? `${hours(value)}` : `${whole(value)} ${label}`;
}

function addTouch(plot) {
  const move = (event) => {
    const box = plot.over.getBoundingClientRect(), touch = event.touches[0];
    plot.setCursor({ left: touch.clientX - box.left, top: touch.clientY - box.top });
  };
  plot.over.addEventListener("touchstart", move, { passive: true });
  plot.over.addEventListener("touchmove", move, { passive: true });
}

function drawAll() {
  plots = [];
  document.querySelectorAll("figure.plot").forEach((figure) => { clear(figure); });
  document.querySelectorAll("figure.plot").forEach(draw);
}

// --- samples

const WHYS = { random: "random", longest: "longest", shortest: "shortest", loss: "highest loss" };

function browse(box) {
  const samples = JSON.parse(box.querySelector("script").textContent);
  const choice = box.querySelector(".why"), place = box.querySelector(".place"), target = box.querySelector(".sample");
  let at = 0, shown = samples;
  const option = (value, text) => { const node = make("option", "", text); node.value = value; return node; };
  const whys = [...new Set(samples.map((sample) => sample.why))];
  choice.replaceChildren(option("", `${say("all")} (${samples.length})`),
    ...whys.map((why) => option(why, `${say(WHYS[why])} (${samples.filter((sample) => sample.why === why).length})`)));
  const show = () => {
    place.textContent = shown.length ? `${at + 1} / ${shown.length}` : "0";
    target.replaceChildren(...(shown.length ? sampleOf(shown[at]) : []));
  };
  const find = box.querySelector(".find"), texts = samples.map((sample) => sample.parts.map((part) => part.messages.map((message) => message.text.join("")).join("\n")).join("\n").toLowerCase());
  choice.onchange = find.oninput = () => {
    const word = find.value.trim().toLowerCase();
    shown = samples.filter((sample, i) => (!choice.value || sample.why === choice.value) && texts[i].includes(word));
    at = 0;
    show();
  };
  const move = (by) => { at = (at + by + shown.length) % (shown.length || 1); show(); };
  box.querySelector(".back").onclick = () => move(-1);
  box.querySelector(".on").onclick = () => move(1);
  const edges = box.querySelector(".edges");
  edges.onchange = () => target.classList.toggle("edges-on", edges.checked);
  show();
}

function sampleOf(sample) {
  const facts = [say(WHYS[sample.why]), `${sample.file} ${say(sample.unit || "line")} ${sample.line}`, `${whole(sample.characters)} ${say("characters")}`];
  if (sample.tokens !== undefined) facts.push(`${whole(sample.tokens)} ${say("tokens")}`, `${say("trained")}: ${whole(sample.trained)}`);
  if (sample.loss !== undefined) facts.push(`${say("loss")} ${trim(sample.loss)}`);
  if (sample.set_aside) facts.push(sample.set_aside);
  const about = make("p", "about");
  facts.forEach((fact, i) => { if (i) about.append(" · "); about.append(make("bdi", "", fact)); });
  const nodes = [about];
  const prompt = sample.parts.filter((part) => part.name !== "chosen" && part.name !== "rejected");
  nodes.push(...prompt.flatMap(partOf));
  const sides = sample.parts.filter((part) => part.name === "chosen" || part.name === "rejected");
  if (sides.length) {
    const row = make("div", "sides");
    for (const side of sides) {
      const column = make("div", "side");
      column.append(make("h4", "", say(side.name)), ...partOf(side));
      row.append(column);
    }
    nodes.push(row);
  }
  const keys = make("div", "keys");
  keys.append(make("span", "t", say("trained")), make("span", "", say("not trained")));
  nodes.push(keys);
  return nodes;
}

function partOf(part) {
  const nodes = part.messages.map((message) => {
    const box = make("div", "message " + message.role);
    box.append(make("div", "role", say(message.role)));
    const text = make("div", "text");
    text.dir = "auto";
    message.text.forEach((piece, i) => {
      const mark = message.marks[Math.min(i, message.marks.length - 1)];
      const isControl = mark === "2" || mark === "3";
      const node = make("span", (mark === "1" || mark === "3" ? "t" : "") + (isControl ? " k" : ""), piece);
      if (message.ids.length) node.title = `${message.ids[i].join(" ")} · ${say(mark === "1" || mark === "3" ? "trained" : "not trained")}${isControl ? " · " + say("control token") : ""}`;
      text.append(node);
    });
    box.append(text);
    return box;
  });
  if (part.hidden) nodes.push(make("p", "hidden", `… ${whole(part.hidden)} ${say(part.messages.some((message) => message.ids.length) ? "more tokens not shown" : "more characters not shown")}`));
  return nodes;
}

// --- tables

// Sorts numbers by size, other values by text, and those that are missing last. sign: 1, or -1 for descending order.
function ordered(one, other, sign) {
  const missing = (value) => value === null || value === undefined || value === "" || value === "–";
  if (missing(one) || missing(other)) return missing(one) - missing(other);
  if (typeof one === "string" && typeof other === "string") return sign * one.localeCompare(other, undefined, { numeric: true });
  return sign * (one - other);
}

// Makes the headings of a table sort it. order(column, sign) is called with the number of the column and 1 or -1.
function sortable(heads, order) {
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    head.tabIndex = 0;
    head.classList.add("sorts");
    head.onclick = () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      order(column, sign);
    };
    head.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.onclick(); } };
  });
}

// Returns buttons that copy rows (lists of values, the headings first) with tabs between them, and save them as CSV.
function exporting(name, rows) {
  const tools = make("div", "tools"), copy = make("button", "", say("copy")), save = make("button", "", "CSV");
  copy.type = save.type = "button";
  const text = (value) => (value === null || value === undefined ? "" : String(value));
  copy.onclick = async () => {
    const lines = rows().map((row) => row.map((value) => text(value).replace(/[\t\r\n]+/g, " ")).join("\t")).join("\n");
    try { await navigator.clipboard.writeText(lines); } catch {
      const area = document.body.appendChild(make("textarea", "", lines));
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    copy.textContent = say("copied");
    setTimeout(() => { copy.textContent = say("copy"); }, 1500);
  };
  save.onclick = () => {
    const lines = rows().map((row) => row.map((value) => (/[",\r\n]/.test(text(value)) ? `"${text(value).replaceAll('"', '""')}"` : text(value))).join(","));
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff" + lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.download = name + ".csv";
    link.click();
    URL.revokeObjectURL(link.href);
  };
  tools.append(copy, save);
  return tools;
}

function valueOf(cell) {
  const text = cell.textContent.trim();
  return cell.dataset.v !== undefined ? Number(cell.dataset.v) : /^\d{1,3}(,\d{3})*$/.test(text) ? Number(text.replaceAll(",", "")) : text;
}

function tabulate(table, number) {
  const body = table.tBodies[0], heads = table.tHead ? [...table.tHead.querySelectorAll("th")] : [];
  if (body.rows.length > 1)
    sortable(heads, (column, sign) => body.append(...[...body.rows].sort((one, other) => ordered(valueOf(one.cells[column]), valueOf(other.cells[column]), sign))));
  const named = heads.map((head) => head.textContent.trim()), rows = () => [named, ...[...body.rows].map((row) => [...row.cells].map(valueOf))].map((row) => row.filter((_, i) => named[i] || i === 0));
  table.after(exporting(`${document.title}-${number + 1}`, rows));
}

// Reads a filter: returns [test of a value, condition for --where], null if it cannot be read.
function filterOf(text, column) {
  const name = column.name;
  const number = (digits) => (digits.endsWith("%") ? Number(digits.slice(0, -1)) / 100 : Number(digits));
  if (typeof column.values.find((value) => value !== null) === "number") {
    const range = text.match(/^(-?[\d.]+%?)\s*(?:-|–|\.\.)\s*(-?[\d.]+%?)$/), limit = text.match(/^(<=|>=|!=|<|>|=)?\s*(-?[\d.]+%?)$/);
    if (range) {
      const [low, high] = [number(range[1]), number(range[2])];
      return [(value) => value !== null && value >= low && value <= high, `${name} between ${low} and ${high}`];
    }
    if (!limit) return null;
    const sign = limit[1] || "=", at = number(limit[2]);
    const tests = { "<": (v) => v < at, ">": (v) => v > at, "<=": (v) => v <= at, ">=": (v) => v >= at, "=": (v) => v === at, "!=": (v) => v !== at };
    return [(value) => value !== null && tests[sign](value), `${name} ${sign} ${at}`];
  }
  const not = text.startsWith("!"), word = text.replace(/^!\s*/, "").toLowerCase();
  const test = (value) => value !== null && plain(value).toLowerCase().includes(word) !== not;
  if (name === "text") return [test, ""];
  const flag = column.values.find((value) => value !== null);
  if (typeof flag === "boolean") return [test, word && say("yes").startsWith(word) !== not ? name : `not ${name}`];
  return [test, `${name} ${not ? "not " : ""}ilike '%${word.replaceAll("'", "''")}%'`];
}

const plain = (value) => (value === null ? "–" : value === true ? say("yes") : value === false ? say("no") : String(value));
const AT_ONCE = 50, SHOWN_COLUMNS = 9;

// A sample of rows that is sorted, filtered and searched.
function tabled(box) {
  const columns = JSON.parse(box.querySelector("script").textContent), number = columns[0].values.length;
  const [table, find, place, pick, choice] = ["table", ".find", ".place", ".pick div", ".choice"].map((name) => box.querySelector(name));
  const filters = columns.map(() => ""), visible = columns.map((_, i) => i < SHOWN_COLUMNS);
  let shown = [], at = 0, sorted = null;
  const isNumber = (column) => typeof column.values.find((value) => value !== null) === "number";
  const write = (column, value) => (typeof value !== "number" ? plain(value) : column.share ? percent(value) : whole(value));
  const list = () => {
    const read = filters.map((text, i) => (text.trim() ? filterOf(text.trim(), columns[i]) : null));
    table.querySelectorAll("input").forEach((input) => input.setAttribute("aria-invalid", String(Boolean(input.value.trim() && !read[input.dataset.column]))));
    const word = find.value.trim().toLowerCase();
    shown = Array.from({ length: number }, (_, i) => i).filter((i) => read.every((one, c) => !one || one[0](columns[c].values[i]))
      && (!word || columns.some((column) => typeof column.values[i] === "string" && column.values[i].toLowerCase().includes(word))));
    if (sorted) shown.sort((one, other) => ordered(columns[sorted[0]].values[one], columns[sorted[0]].values[other], sorted[1]));
    const where = read.map((one) => one && one[1]).filter(Boolean).join(" and ");
    choice.hidden = !where;
    choice.querySelector("bdi").textContent = `--where "${where}"`;
    at = 0;
    fill();
  };
  const fill = () => {
    place.textContent = shown.length ? `${at + 1}–${Math.min(at + AT_ONCE, shown.length)} / ${whole(shown.length)}` : "0";
    table.tBodies[0].replaceChildren(...shown.slice(at, at + AT_ONCE).map((i) => {
      const row = make("tr");
      columns.forEach((column, c) => { if (visible[c]) row.append(make("td", isNumber(column) ? "num" : column.name)), row.lastChild.append(make("div", "", write(column, column.values[i]))); });
      return row;
    }));
  };
  const build = () => {
    const heads = make("tr"), inputs = make("tr");
    const chosen = columns.map((_, i) => i).filter((i) => visible[i]);
    for (const c of chosen) {
      const head = make("th", isNumber(columns[c]) ? "" : "left", columns[c].name), cell = make("th"), input = make("input");
      head.title = columns[c].help;
      if (sorted && sorted[0] === c) head.setAttribute("aria-sort", sorted[1] > 0 ? "ascending" : "descending");
      input.value = filters[c];
      input.dataset.column = c;
      input.setAttribute("aria-label", columns[c].name);
      input.oninput = () => { filters[c] = input.value; list(); };
      cell.append(input);
      heads.append(head);
      inputs.append(cell);
    }
    const top = make("thead");
    top.append(heads, inputs);
    table.replaceChildren(top, make("tbody"));
    sortable([...heads.cells], (column, sign) => { sorted = [chosen[column], sign]; list(); });
    list();
  };
  columns.forEach((column, c) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.checked = visible[c];
    box.onchange = () => { visible[c] = box.checked; if (!box.checked) filters[c] = ""; build(); };
    label.append(box, " ", make("span", "", column.name));
    label.title = column.help;
    pick.append(label);
  });
  const move = (by) => { if (at + by >= 0 && at + by < shown.length) { at += by; fill(); } };
  box.querySelector(".back").onclick = () => move(-AT_ONCE);
  box.querySelector(".on").onclick = () => move(AT_ONCE);
  find.oninput = list;
  table.parentNode.after(exporting(`${document.title}-rows`, () => [columns.map((column) => column.name), ...shown.map((i) => columns.map((column) => column.values[i]))]));
  build();
}

// --- the page

const THEMES = ["auto", "light", "dark"];
const button = document.getElementById("theme");
function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  button.textContent = { auto: "◐ ", light: "☀ ", dark: "☾ " }[theme] + say(theme);
  button.dataset.theme = theme;
}
button.onclick = () => {
  const theme = THEMES[(THEMES.indexOf(button.dataset.theme) + 1) % THEMES.length];
  setTheme(theme);
  try { localStorage.setItem("mm-theme", theme); } catch { /* a page opened from a file may have no localStorage */ }
  drawAll();
};
let kept = "auto";
try { kept = localStorage.getItem("mm-theme") || "auto"; } catch { /* no localStorage, see above */ }
setTheme(THEMES.includes(kept) ? kept : "auto");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

function start() {
  drawAll();
  document.querySelectorAll(".browser").forEach(browse);
  document.querySelectorAll("main .scroll > table").forEach((table, i) => { if (!table.closest(".rows")) tabulate(table, i); });
  document.querySelectorAll(".rows").forEach(tabled);
  document.querySelectorAll("details").forEach((node) => node.addEventListener("toggle", () => {
    if (node.open) node.querySelectorAll("figure.plot").forEach(draw);
  }));
}
for (const id of ["axis", "smooth", "log"]) if (controlOf(id)) controlOf(id).oninput = drawAll;
start();

let width = innerWidth;
let waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 120);
});
let before = "";
addEventListener("beforeprint", () => { if (!printing) before = button.dataset.theme; printing = true; setTheme("light"); drawAll(); });
addEventListener("afterprint", () => { if (!printing) return; printing = false; setTheme(before); drawAll(); });

if (root.dataset.refresh) {
  let last = "";
  setInterval(async () => {
    try {
      const text = await (await fetch(location.href, { cache: "no-store" })).text();
      if (text === last) return;
      const isFirst = !last;
      last = text;
      if (isFirst) return;
      const found = new DOMParser().parseFromString(text, "text/html");
      const open = [...document.querySelectorAll("details")].map((node) => node.open);
      document.querySelector("main").replaceWith(found.querySelector("main"));
      document.querySelectorAll("details").forEach((node, i) => { node.open = open[i] || false; });
      document.querySelector(".subtitle").replaceWith(found.querySelector(".subtitle"));
      start();
      root.dataset.refreshed = String(Number(root.dataset.refreshed || 0) + 1);
    } catch { /* the server of the page has stopped: the page stays as it is */ }
  }, 1000 * Number(root.dataset.refresh));
}
root.dataset.ready = "yes";
})();
