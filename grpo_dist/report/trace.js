// A completion token by token: who wrote each, and what rollout and trainer say of it.

const WRITERS = { m: "the model", t: "a tool or an environment", x: "the chat template" };
/** By what tokens are coloured: their value, and from which values on each darker shade is used. */
const COLOURS = {
  "log-probability": { value: (token) => token.logprob, from: [0.1, 0.7, 1.6, 3] },
  entropy: { value: (token) => token.entropy, from: [0.1, 0.5, 1, 2] },
  "gap to the trainer": { value: (token) => token.gap, from: [0.001, 0.01, 0.05, 0.2] },
  advantage: { value: (token) => token.advantage, from: [0.001, 0.5, 1, 2], isSigned: true },
};

/** The tokens of a trace as objects; numbers null where there is none. */
function tokensOf(trace) {
  let sampled = 0;
  return trace.text.map((text, place) => {
    const by = trace.by[place];
    if (by !== "m") return { text, by };
    const numbers = Object.fromEntries(["logprob", "gap", "entropy", "advantage"].map((name) => [name, trace[name]?.[sampled] ?? null])
      .map(([name, value]) => [name, value == null ? null : value / 1e6]));
    sampled += 1;
    return { text, by, ...numbers };
  });
}

/** What a pointer over a token shows. */
function describe(token) {
  if (token.by !== "m") return `by ${WRITERS[token.by]}`;
  const advantage = token.advantage == null ? "" : `advantage ${short(token.advantage)}, `;
  const trained = token.gap == null ? "no gradient, so not computed by the trainer" : `entropy ${short(token.entropy)}, gap to the trainer ${short(token.gap)}`;
  return `by ${WRITERS.m}: log-probability ${short(token.logprob)} (${percent(Math.exp(token.logprob))}), ${advantage}${trained}`;
}

/** The tokens as elements, with a button for those after the first SHOWN_CHARACTERS. */
function traced(trace, colour) {
  const { value, from, isSigned } = COLOURS[colour];
  const all = tokensOf(trace);
  const nodes = all.map((token) => {
    const size = token.by === "m" ? Math.abs(value(token) ?? 0) : 0;
    const shade = `by-m shade${from.filter((least) => size >= least).length}${isSigned && value(token) < 0 ? " minus" : ""}${token.gap == null ? " untrained" : ""}`;
    return make("span", { class: token.by === "m" ? shade : `by-${token.by}`, title: describe(token) }, token.text);
  });
  let characters = 0;
  const end = all.findIndex((token) => (characters += token.text.length) > SHOWN_CHARACTERS);
  if (end < 0) return withNumbers(all, nodes, nodes);
  const button = make("button", { type: "button", click: () => button.replaceWith(...nodes.slice(end)) }, `… show all ${integer(all.length)} tokens`);
  return withNumbers(all, nodes, [...nodes.slice(0, end), button]);
}

/** Tokens whose numbers are read without a pointer over them: the arrow keys or a tap choose one. */
function withNumbers(all, nodes, shown) {
  const numbers = make("p", { class: "note", role: "status" });
  let chosen = -1;
  const choose = (place) => {
    if (!nodes[place]?.isConnected) return;
    nodes[chosen]?.classList.remove("chosen");
    chosen = place;
    nodes[chosen].classList.add("chosen");
    numbers.textContent = describe(all[chosen]);
  };
  return [make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens: the arrow keys show the numbers of each",
    click: (event) => choose(nodes.indexOf(event.target)),
    keydown: (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move || event.target !== event.currentTarget) return;
      event.preventDefault();
      choose(Math.max(0, chosen + move));
    } }, shown), numbers];
}

function legendOfWriters() {
  const shades = [0, 1, 2, 3, 4].map((shade) => make("span", { class: `by-m shade${shade}` }, "\u00a0"));
  return make("p", { class: "note", id: "writers" }, "Of one prompt a step, tokens are told apart: ",
    make("span", { class: "by-m" }, "the model"), ", ", make("span", { class: "by-t" }, "a tool or an environment"), ", ",
    make("span", { class: "by-x" }, "the chat template"), ". Shades from a small to a large number: ", shades,
    ", of a negative advantage ", make("span", { class: "by-m shade3 minus" }, "\u00a0"), "; dotted lines: ",
    make("span", { class: "by-m untrained" }, "no gradient"), ". Point at a token, tap it or use the arrow keys to see its numbers, in nats.");
}
