// Line charts and heat maps over steps, as SVG. All of them print the values of the same step.

const LABEL_PIXELS = 11.5; // as in style.css

/** Mean of each value's neighbours. Weights fall by a factor with each place, equally on both sides, so that the curve
 * does not lag. Gaps stay gaps. */
function smoothed(values, factor) {
  const oneSided = (places) => {
    const sums = [];
    let [sum, weights] = [0, 0];
    for (const place of places) {
      if (values[place] == null) continue;
      [sum, weights] = [values[place] + factor * sum, 1 + factor * weights];
      sums[place] = [sum, weights];
    }
    return sums;
  };
  const places = [...values.keys()];
  const [before, after] = [oneSided(places), oneSided(places.reverse())];
  return values.map((value, i) => (value == null ? null : (before[i][0] + after[i][0] - value) / (before[i][1] + after[i][1] - 1)));
}

/** Metrics that are not smoothed, because they have no noise or too few values. */
const isExact = (name) => ["learning_rate", "memory/peak_gib", "epoch"].includes(name) || name.startsWith("eval/");

/** The lines of metrics. Each variant has a line with the mean of its runs, and the range between them. */
function seriesOf(metrics) {
  const lines = [];
  for (const variant of variants) {
    if (state.hidden.has(variant.number)) continue;
    metrics.forEach(({ name, label }, place) => {
      const steps = new Map();
      for (const run of variant.members) {
        const raw = run.curves[name];
        if (!raw) continue;
        const smooth = smoothed(raw, isExact(name) || raw.filter((value) => value != null).length < 10 ? 0 : state.smoothing);
        run.curves.step.forEach((step, i) => {
          if (raw[i] == null) return;
          if (!steps.has(step)) steps.set(step, { raw: [], smooth: [] });
          steps.get(step).raw.push(raw[i]);
          steps.get(step).smooth.push(smooth[i]);
        });
      }
      const mean = (values) => values.reduce((a, b) => a + b) / values.length;
      const [first, last] = shownRange();
      const shown = [...steps].filter(([step]) => step >= first && step <= last);
      const points = shown.sort((a, b) => a[0] - b[0]).map(([step, { raw, smooth }]) => ({
        step, raw: mean(raw), value: mean(smooth), low: Math.min(...smooth), high: Math.max(...smooth),
      }));
      if (points.length) {
        const several = variants.length > 1;
        lines.push({
          points, color: (several ? variant.number : place) % 8, dashed: several && place > 0,
          label: [several ? variant.label : null, label].filter(Boolean).join(", "), range: variant.members.length > 1,
        });
      }
    });
  }
  return lines;
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = [0.5, 1, 2, 5, 10].map((n) => n * power);
  const multiples = (step) => {
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, n) => (first + n) * step + 0);
  };
  const place = steps.findIndex((step, n) => n && step >= rough * 0.999);
  const values = multiples(steps[place]);
  return values.length > 1 ? values : multiples(steps[place - 1]); // one mark alone tells no scale
}

/** Ticks of a logarithmic axis: powers of ten, and 2 and 5 times them below two decades. */
function logTicks(low, high, most) {
  const factors = high / low > 100 ? [1] : [1, 2, 5];
  const powers = Array.from({ length: Math.floor(Math.log10(high)) - Math.floor(Math.log10(low)) + 1 },
    (_, n) => 10 ** (Math.floor(Math.log10(low)) + n));
  const values = powers.flatMap((power) => factors.map((factor) => factor * power)).filter((value) => value >= low && value <= high);
  const every = Math.ceil(values.length / (most + 2));
  return values.length > 1 ? values.filter((_, place) => place % every === 0) : ticks(low, high, most);
}

/** The scale of values: logarithmic if chosen and if all values are above 0. A linear one starts from 0 if that needs
 * little space. `share` maps a value to its height, from 0 to 1. */
function scaleOf(lines) {
  const values = lines.flatMap((line) => line.points.flatMap((point) => [point.raw, point.low, point.high]));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const isLog = state.log && low > 0;
  if (!isLog && low >= 0 && low < high / 2) low = 0;
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  high = isLog ? high * (high / low) ** 0.04 : high + (high - low) * 0.04;
  const transform = isLog ? Math.log10 : (value) => value;
  const share = (value) => (transform(value) - transform(low)) / (transform(high) - transform(low));
  return { isLog, share, marks: (isLog ? logTicks : ticks)(low, high, 3) };
}

const LAST_STEP = Math.max(1, ...runs.flatMap((run) => run.curves.step));
const FIRST_STEP = Math.min(LAST_STEP - 1, ...runs.flatMap((run) => run.curves.step));

/** First and last step that line charts show. */
const shownRange = () => state.range ?? [FIRST_STEP, LAST_STEP];

/** Show only the steps between two, or all steps if the two are equal or cover everything. */
function zoom(one, other) {
  const [first, last] = [Math.max(FIRST_STEP, Math.min(one, other)), Math.min(LAST_STEP, Math.max(one, other))];
  set({ range: first < last && (first > FIRST_STEP || last < LAST_STEP) ? [first, last] : null, cursor: null });
}

/** Positions on the axis of steps, which all line charts share. */
function stepAxis(left, right) {
  const [first, last] = shownRange();
  const place = (step) => left + ((step - first) / (last - first)) * (right - left);
  const step = (x) => Math.round(first + ((x - left) / (right - left)) * (last - first));
  return { place, step: (x) => Math.min(last, Math.max(first, step(x))) };
}

function path(points, x, y) {
  return points.map((point, i) => `${i ? "L" : "M"}${x(point).toFixed(1)} ${y(point).toFixed(1)}`).join("");
}

/** The last point of a line up to a step. */
function pointAt(line, step) {
  const until = step == null ? line.points : line.points.filter((point) => point.step <= step);
  return until[until.length - 1];
}

/** Let the pointer choose the step whose values are printed. */
function followPointer(svg, stepOf) {
  svg.addEventListener("pointermove", (event) => {
    set({ cursor: stepOf(event.clientX - svg.getBoundingClientRect().left) });
  });
  svg.addEventListener("pointerleave", () => set({ cursor: null }));
}

/** Zoom to the steps that the pointer drags over, and show all steps after a double click. A finger scrolls instead. */
function zoomByPointer(svg, axis, box) {
  const area = svg.appendChild(make("rect", { class: "chosen", y: box.top, height: box.bottom - box.top, width: 0 }));
  const inside = (event) => Math.min(box.right, Math.max(box.left, event.clientX - svg.getBoundingClientRect().left));
  let start = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" || event.button !== 0) return;
    start = inside(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (start == null) return;
    area.setAttribute("x", Math.min(start, inside(event)));
    area.setAttribute("width", Math.abs(inside(event) - start));
  });
  const stop = () => {
    start = null;
    area.setAttribute("width", 0);
  };
  svg.addEventListener("pointercancel", stop);
  svg.addEventListener("pointerup", (event) => {
    const [from, end] = [start, inside(event)];
    stop();
    if (from != null && Math.abs(end - from) > 5) zoom(axis.step(from), axis.step(end));
  });
  svg.addEventListener("dblclick", () => zoom(FIRST_STEP, LAST_STEP));
}

/** The title of a chart, and below it the printed values. */
function caption(title, unit, readout = null) {
  return make("figcaption", {}, make("div", { class: "title" }, title, make("span", { class: "unit" }, ` ${unit}`)), readout ?? "");
}

/** Lines of metrics. For small charts, the toolbar names the colours of the runs. */
function lineChart({ title, metrics, unit = "", small = true }) {
  const height = small ? 150 : 240;
  const readout = make("div", { class: "readout" });
  const holder = make("div", { class: "plot" });
  const figure = make("figure", { class: "chart", "data-metric": metrics[0].name },
    caption(title, unit, readout), holder);
  let lines = [];
  let axis = null;
  let mark = null;
  const draw = () => {
    lines = seriesOf(metrics);
    const width = holder.clientWidth || 320;
    const box = { left: 50, right: width - 8, top: 8, bottom: height - 22 };
    axis = stepAxis(box.left, box.right);
    const svg = make("svg", { width, height, role: "img", "aria-label": title });
    if (lines.length) {
      const scale = scaleOf(lines);
      const y = (value) => box.bottom - scale.share(value) * (box.bottom - box.top);
      const x = (point) => axis.place(point.step);
      if (state.log && !scale.isLog) svg.append(make("text", { class: "tick", x: box.right, y: box.top + 10, "text-anchor": "end" }, "linear: has values up to 0"));
      for (const tick of scale.marks) {
        svg.append(make("line", { class: "rule", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
          make("text", { class: "tick", x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
      }
      for (const line of lines) drawLine(svg, line, x, y);
    } else {
      svg.append(make("text", { class: "tick", x: box.left, y: height / 2 }, "nothing to draw"));
    }
    drawSteps(svg, axis, box);
    mark = svg.appendChild(make("line", { class: "cursor", y1: box.top, y2: box.bottom }));
    followPointer(svg, axis.step);
    zoomByPointer(svg, axis, box);
    holder.replaceChildren(svg);
    read();
  };
  const read = () => {
    const [first, last] = shownRange();
    const at = state.cursor ?? last;
    for (const [name, value] of [["x1", axis.place(at)], ["x2", axis.place(at)]]) mark.setAttribute(name, value);
    mark.setAttribute("visibility", state.cursor == null || at < first || at > last ? "hidden" : "visible");
    readout.replaceChildren(...lines.map((line) => make("span", { title: line.label }, swatch(line.color, line.dashed),
      lines.length > 1 && !small ? `${line.label} ` : "", make("b", {}, short(pointAt(line, state.cursor)?.raw)))));
  };
  whenPlaced(holder, draw);
  watch(["width", "smoothing", "hidden", "range", "log"], () => holder.isConnected && draw());
  watch(["cursor"], () => mark && read());
  return figure;
}

function drawLine(svg, line, x, y) {
  const color = `var(--c${line.color})`;
  const dash = line.dashed ? "5 3" : null;
  if (line.range) {
    const back = [...line.points].reverse();
    svg.append(make("path", { class: "band", fill: color,
      d: `${path(line.points, x, (p) => y(p.high))}${path(back, x, (p) => y(p.low)).replace("M", "L")}Z` }));
  } else if (line.points.some((point) => point.raw !== point.value)) {
    svg.append(make("path", { class: "raw", stroke: color, d: path(line.points, x, (p) => y(p.raw)) }));
  }
  svg.append(make("path", { class: "line", stroke: color, "stroke-dasharray": dash, d: path(line.points, x, (p) => y(p.value)) }));
  if (line.points.length < 16) {
    for (const point of line.points) svg.append(make("circle", { cx: x(point), cy: y(point.value), r: 3, fill: color }));
  }
}

function drawSteps(svg, axis, box) {
  svg.append(make("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const marks = ticks(...shownRange(), (box.right - box.left) / 70).filter(Number.isInteger);
  marks.forEach((step, i) => svg.append(make("text", { class: "tick", x: axis.place(step), y: box.bottom + 15,
    "text-anchor": i === marks.length - 1 && axis.place(step) > box.right - 12 ? "end" : "middle" },
    i === 0 ? `step ${step}` : integer(step))));
}

function swatch(color, dashed = false) {
  return make("svg", { width: 16, height: 10, "aria-hidden": "true" }, make("line", { x1: 0, x2: 16, y1: 5, y2: 5,
    stroke: `var(--c${color})`, "stroke-width": 3, "stroke-dasharray": dashed ? "5 3" : null }));
}

/** Draw when the element is on the page and has a width. */
function whenPlaced(node, draw) {
  requestAnimationFrame(() => (node.isConnected ? draw() : whenPlaced(node, draw)));
}

const ruler = document.createElement("canvas").getContext("2d");

/** The width of a label in pixels. */
function widthOf(text) {
  ruler.font = `${LABEL_PIXELS}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

/** A label of at most a width: a longer text loses its middle, because answers often begin alike. */
function fitting(text, width) {
  const letters = [...text];
  let kept = letters.length;
  const shown = () => (kept === letters.length ? text
    : `${letters.slice(0, Math.ceil(kept / 2)).join("")}…${letters.slice(letters.length - Math.floor(kept / 2)).join("")}`);
  while (kept > 0 && widthOf(shown()) > width) kept -= 1;
  return shown();
}

/** Shares of a step's completions by row. The number at the right is the share at the printed step. */
function heatMap({ title, note, mapOf }) {
  const holder = make("div", { class: "plot" });
  const readout = make("div", { class: "readout" });
  const figure = make("figure", { class: "chart heat", "data-map": title },
    caption(title, note, readout), holder);
  const rowHeight = 19;
  let shown = null;
  const draw = () => {
    const map = mapOf(runs[state.run]);
    figure.hidden = !map;
    if (!map) return;
    const width = holder.clientWidth || 320;
    const names = map.rows.map((row) => fitting(row || "(empty)", width * 0.4 - 8));
    const left = 14 + Math.max(...names.map(widthOf));
    const right = width - 44;
    const height = map.rows.length * rowHeight + 20;
    const cell = (right - left) / map.columns.length;
    const most = Math.max(...map.shares.filter((_, r) => map.rows[r] !== data.other).flat(), 1e-9);
    const svg = make("svg", { width, height, role: "img", "aria-label": title });
    const figures = map.rows.map((row, r) => {
      const y = r * rowHeight;
      svg.append(make("text", { class: "label", x: left - 6, y: y + 13, "text-anchor": "end" }, make("title", {}, row), names[r]),
      make("rect", { class: "ground", x: left, y: y + 1, width: right - left, height: rowHeight - 2 }));
      map.shares[r].forEach((share, c) => share > 0 && svg.append(make("rect", { class: row === data.other ? "cell other" : "cell", x: left + c * cell, y: y + 1,
        width: cell + 0.3, height: rowHeight - 2, "fill-opacity": Math.min(1, Math.max(0.07, share / (row === data.other ? 1 : most))).toFixed(3) })));
      return svg.appendChild(make("text", { class: "figure", x: width - 2, y: y + 13, "text-anchor": "end" }));
    });
    const stepsAt = [[0, "start"], [map.columns.length - 1, "end"]];
    for (const [c, anchor] of stepsAt) {
      svg.append(make("text", { class: "tick", x: c ? right : left, y: height - 5, "text-anchor": anchor },
        `step ${integer(c ? map.columns[c][1] : map.columns[c][0])}`));
    }
    const mark = svg.appendChild(make("rect", { class: "cursor", y: 0, width: cell, height: height - 20 }));
    followPointer(svg, (x) => map.columns[Math.min(map.columns.length - 1, Math.max(0, Math.floor((x - left) / cell)))][1]);
    holder.replaceChildren(svg);
    shown = { map, figures, mark, left, cell, most };
    read();
  };
  const read = () => {
    const { map, figures, mark, left, cell, most } = shown;
    const after = map.columns.findIndex(([, last]) => last >= (state.cursor ?? Infinity));
    const c = after < 0 ? map.columns.length - 1 : after;
    figures.forEach((node, r) => { node.textContent = percent(map.shares[r][c]); });
    mark.setAttribute("x", left + c * cell);
    mark.setAttribute("visibility", state.cursor == null ? "hidden" : "visible");
    const [first, last] = map.columns[c];
    readout.replaceChildren(make("span", { class: "scale" }, "0 ", make("i", {}), ` ${percent(most)}`),
      make("span", {}, "at step ", make("b", {}, first === last ? integer(last) : `${integer(first)}–${integer(last)}`)));
  };
  whenPlaced(holder, draw);
  watch(["width", "run"], () => holder.isConnected && draw());
  watch(["cursor"], () => shown && read());
  return figure;
}
