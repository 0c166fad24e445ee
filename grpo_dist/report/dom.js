"use strict";
// The data, the state that panels share, and functions that make elements and format numbers. All texts become text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const variants = [...new Set(runs.map((run) => run.variant))].map((number) => {
  const members = runs.filter((run) => run.variant === number);
  return { number, members, label: variantLabel(members) };
});

function variantLabel(members) {
  const names = members.map((run) => run.name);
  if (names.length === 1) return names[0];
  let common = names[0];
  while (common && !names.every((name) => name.startsWith(common))) common = common.slice(0, -1);
  const label = common.replace(/[\s_./-]*(seed)?[\s_./-]*$/i, "") || `${names[0]} … ${names[names.length - 1]}`;
  const seeds = new Set(members.map((run) => run.config["train.seed"]));
  return `${label} (${names.length} ${seeds.size === names.length ? "seeds" : "runs"})`;
}

const state = {
  cursor: null, // the step whose values all plots print; null is the last step of each plot
  smoothing: usualSmoothing(Math.max(...runs.map((run) => run.curves.step.length))),
  link: null, // what the page's address names: kind (completion or prompt), step and place
  run: 0, // the run whose answers, times and completions are shown
  hidden: new Set(), // numbers of variants that are not drawn
  range: null, // first and last step of the line charts; null is all steps
  log: false, // whether the line charts have logarithmic values
  width: 0,
};

/** The factor for which the weights cover a fortieth of the points, and at least four. */
function usualSmoothing(numPoints) {
  const reach = Math.max(4, numPoints / 40);
  return Math.round((50 * (reach - 1)) / (reach + 1)) / 50;
}

const watchers = [];

/** Call `draw` now, and again when one of the `keys` of the state changes. */
function watch(keys, draw) {
  watchers.push({ keys, draw });
  draw();
}

function set(changes) {
  Object.assign(state, changes);
  for (const { keys, draw } of watchers) if (keys.some((key) => key in changes)) draw();
}

const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "text", "g", "title"]);

function make(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

/** A section of the page, which the navigation links to. */
function section(id, title, ...children) {
  return make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title` }, title), ...children.filter(Boolean));
}

function table(heads, rows, attributes = {}) {
  const head = make("tr", {}, heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, first), cells.map((cell) => make("td", {}, cell))));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": attributes.label },
    make("table", { class: attributes.class }, make("thead", {}, head), make("tbody", {}, body)));
}

const MINUS = "\u2212";
const NONE = "–";

/** A number with about three digits. */
function short(value) {
  if (value == null) return NONE;
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e9)
    ? value.toExponential(1).replace(".0e", "e")
    : new Intl.NumberFormat("en", size >= 1e4
      ? { notation: "compact", maximumSignificantDigits: 3 }
      : { maximumSignificantDigits: size >= 1e3 ? 4 : 3 }).format(value);
  return text.replaceAll("-", MINUS);
}

function integer(value) {
  return new Intl.NumberFormat("en").format(value);
}

/** A number of things, such as `1 step`. */
const counted = (number, thing) => `${integer(number)} ${thing}${number === 1 ? "" : "s"}`;

/** Why a run shows no completions. */
const without = (run) => (run.config["logging.log_completions"] === false
  ? "This run kept no completions: logging.log_completions is off."
  : `This run has no completions${run.totals.steps ? ": completions/ has none of its steps" : " yet"}.`);

function percent(share) {
  if (share == null) return NONE;
  return `${share > 0 && share < 0.01 ? "<1" : Math.round(100 * share)} %`;
}

function duration(seconds) {
  if (seconds < 0.1) return `${short(1000 * seconds)} ms`;
  if (seconds < 100) return `${short(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** The value of an option, about as in YAML. */
function written(value) {
  if (value === undefined) return NONE;
  return typeof value === "string" ? value : JSON.stringify(value);
}
