// A list of completions with filters, and a comparison of two completions of one prompt.

const PAGE = 40;
const SHOWN_CHARACTERS = 700;

/** The sampled completions of a run as objects, made at their first use. */
function rowsOf(run) {
  run.completions.table ??= run.completions.rows.map((row) => {
    const made = Object.fromEntries(data.fields.map((name, place) => [name, row[place]]));
    return { ...made, prompt: run.completions.prompts[made.prompt] };
  });
  return run.completions.table;
}

const ORDERS = {
  "latest step first": (a, b) => b.step - a.step,
  "first step first": (a, b) => a.step - b.step,
  "highest reward first": (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
  "lowest reward first": (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
  "longest first": (a, b) => b.tokens - a.tokens,
  "shortest first": (a, b) => a.tokens - b.tokens,
};

/** Whether a row passes the filters of the form. An empty field does not filter. */
function passes(row, filter) {
  const inside = (value, low, high) => (low === "" || (value != null && value >= Number(low))) && (high === "" || (value != null && value <= Number(high)));
  return inside(row.step, filter.first, filter.last) && inside(row.reward, filter.low, filter.high)
    && (!filter.text || row.prompt.toLowerCase().includes(filter.text) || row.completion.toLowerCase().includes(filter.text));
}

function completionsPanel() {
  const number = (id, label) => make("label", {}, label, make("input", { type: "number", id, step: "any", inputmode: "decimal" }));
  const text = make("input", { type: "search", id: "text", placeholder: "words of a prompt or completion" });
  const colour = make("select", { id: "colour" }, Object.keys(COLOURS).map((name) => make("option", {}, name)));
  const order = make("select", { id: "order" }, Object.keys(ORDERS).map((name) => make("option", {}, name)));
  const form = make("form", { class: "filter", submit: (event) => event.preventDefault(), input: () => refresh(),
    reset: () => setTimeout(refresh) },
  make("label", { class: "grow" }, "Text", text), number("first", "Step from"), number("last", "to"),
  number("low", "Reward from"), number("high", "to"), make("label", {}, "Order", order), make("label", {}, "Colour by", colour), make("button", { type: "reset" }, "Clear"));
  const count = make("p", { class: "note", role: "status", id: "count" });
  const list = make("tbody", {});
  const heads = ["Step", "Reward", "Advantage", "Tokens", "Prompt", "Completion", ""].map((text) => make("th", { scope: "col" }, text));
  const more = make("button", { type: "button", id: "more", click: () => show(list.children.length + PAGE) }, "Show more");
  const alone = make("p", { class: "note", id: "alone" }, "A link has chosen these completions. ", make("a", { href: "#completions" }, "Show all"));
  let matches = [];
  const show = (most) => {
    list.append(...matches.slice(list.children.length, most).map((row) => completionItem(row, colour.value)));
    more.hidden = list.children.length >= matches.length;
    more.textContent = `Show ${Math.min(PAGE, matches.length - list.children.length)} more of ${integer(matches.length)}`;
  };
  const refresh = () => {
    const filter = Object.fromEntries(["first", "last", "low", "high"].map((id) => [id, form.querySelector(`#${id}`).value]));
    filter.text = text.value.toLowerCase();
    const run = runs[state.run];
    const rows = rowsOf(run);
    const linked = linkedRows(rows);
    matches = linked ?? rows.filter((row) => passes(row, filter)).sort(ORDERS[order.value]);
    alone.hidden = !linked;
    const { total, steps_read: read, num_steps: steps } = run.completions;
    const kept = rows.length < total ? `a sample of ${integer(rows.length)} from the ${integer(total)} completions` : `all ${integer(total)} completions`;
    count.textContent = !read ? without(run) : `${integer(matches.length)} match, of ${kept} of ${read < steps ? `${read} evenly spaced steps of ${integer(steps)}` : counted(steps, "step")}. completions/ has all of them.`;
    list.replaceChildren();
    show(PAGE);
  };
  watch(["run", "link"], refresh);
  return section("completions", "Completions", form, legendOfWriters(), alone, count,
    make("table", { class: "rows" }, make("thead", {}, make("tr", {}, heads)), list), more);
}

/** The completions that the page's address names, in order of their steps; null where it names none. */
function linkedRows(rows) {
  const { kind, step, place } = state.link ?? {};
  if (!kind) return null;
  const named = rows.find((row) => row.step === step && row.place === place);
  if (!named) return [];
  return kind === "completion" ? [named] : rows.filter((row) => row.prompt === named.prompt).sort((a, b) => a.step - b.step || a.place - b.place);
}

/** Read the page's address: `#completion=RUN.STEP.PLACE` is one completion, `#prompt=…` all of its prompt. */
function followAddress() {
  const match = /^#(completion|prompt)=(\d+)\.(\d+)\.(\d+)$/.exec(location.hash);
  if (!match && !state.link) return;
  const [run, step, place] = match ? match.slice(2).map(Number) : [state.run];
  set({ run: Math.min(run, runs.length - 1), link: match ? { kind: match[1], step, place } : null });
  if (match) document.getElementById("completions").scrollIntoView();
}

function completionItem(row, colour) {
  const address = `${state.run}.${row.step}.${row.place}`;
  const parts = Object.entries(row.rewards).map(([name, value]) => `${name} ${typeof value === "number" ? short(value) : written(value)}`).join(", ");
  const tone = row.advantage > 0 ? "good" : row.advantage < 0 ? "bad" : "";
  return make("tr", {},
    make("td", { "data-label": "step" }, integer(row.step)),
    make("td", { "data-label": "reward", class: tone }, row.reward == null ? "unscored" : short(row.reward), parts ? ` (${parts})` : ""),
    make("td", { "data-label": "advantage" }, short(row.advantage)),
    make("td", { "data-label": "tokens" }, integer(row.tokens), row.finished ? "" : ", truncated"),
    make("td", { class: "text prompt" }, long(row.prompt)),
    make("td", { class: "text" }, row.trace ? traced(row.trace, colour) : long(row.completion, row.cut_from)),
    make("td", {}, make("div", { class: "actions" }, make("button", { type: "button", class: "compare", click: () => compare(row) }, "Compare"),
      make("a", { href: `#prompt=${address}`, title: "All completions of this prompt, from the first step on" }, "Follow"),
      make("a", { href: `#completion=${address}`, title: "An address of this completion alone" }, "Link"))));
}

/** A text with a button that shows its rest. If the page has only the start of a text, `cutFrom` is its full length. */
function long(text, cutFrom = 0) {
  const node = make("span", {}, text.slice(0, SHOWN_CHARACTERS) || make("em", {}, "empty"));
  const note = cutFrom ? make("em", {}, ` … cut: the completion has ${integer(cutFrom)} characters, completions/ has all of them`) : null;
  if (text.length <= SHOWN_CHARACTERS) return [node, note];
  const button = make("button", { type: "button", click: () => { node.textContent = text; button.replaceWith(note ?? ""); } },
    `… show all ${integer(text.length)} characters${cutFrom ? ` kept of ${integer(cutFrom)}` : ""}`);
  return [node, button];
}

/** Open the comparison of this completion with another one of the same prompt, the farthest in training. */
function compare(row) {
  const run = runs[state.run];
  const all = rowsOf(run).filter((each) => each.prompt === row.prompt).sort((a, b) => a.step - b.step);
  const seen = new Map();
  const names = all.map((each) => {
    seen.set(each.step, (seen.get(each.step) ?? 0) + 1);
    return `step ${each.step}, no. ${seen.get(each.step)}, reward ${each.reward == null ? "unscored" : short(each.reward)}`;
  });
  const other = Math.abs(all[0].step - row.step) > Math.abs(all[all.length - 1].step - row.step) ? 0 : all.length - 1;
  const chosen = [all.indexOf(row), other].sort((a, b) => a - b);
  const views = [make("div", { class: "text" }), make("div", { class: "text" })];
  const note = make("p", { class: "note", role: "status" });
  const selects = chosen.map((place, side) => make("select", { "aria-label": ["Left completion", "Right completion"][side], change: () => draw() },
    names.map((name, i) => make("option", { value: i, selected: i === place }, name))));
  const draw = () => {
    const [left, right] = selects.map((select) => all[Number(select.value)].completion);
    const parts = difference(left, right);
    views[0].replaceChildren(...(parts ? spans(parts, "removed") : [left]));
    views[1].replaceChildren(...(parts ? spans(parts, "added") : [right]));
    note.textContent = !parts ? "The texts are too long to mark the differences." : left === right ? "The two texts are the same." : "Words that only one side has are marked.";
  };
  const dialog = make("dialog", { "aria-label": "Comparison of two completions", close: () => dialog.remove() },
    make("form", { method: "dialog" }, make("h3", {}, "Two completions of one prompt"), make("button", { autofocus: true }, "Close")),
    make("div", { class: "text prompt" }, long(row.prompt)), note,
    make("div", { class: "sides" }, make("div", {}, selects[0], views[0]), make("div", {}, selects[1], views[1])));
  draw();
  document.body.append(dialog);
  dialog.showModal();
}

function spans(parts, own) {
  return parts.filter(([kind]) => kind === "same" || kind === own).map(([kind, text]) =>
    (kind === "same" ? make("span", {}, text) : make(own === "added" ? "ins" : "del", {}, text)));
}

const MOST_PAIRS = 4_000_000;

/** The longest common subsequence of words, as [kind, text] with kind same, removed or added; null if too long. */
function difference(left, right) {
  const [a, b] = [left, right].map((text) => text.match(/\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? []);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const [x, y] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  if (x.length * y.length > MOST_PAIRS) return null;
  const width = y.length + 1;
  const common = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i -= 1) {
    for (let j = y.length - 1; j >= 0; j -= 1) {
      common[i * width + j] = x[i] === y[j] ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const parts = [["same", a.slice(0, start).join("")]];
  let [i, j] = [0, 0];
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) { parts.push(["same", x[i]]); i += 1; j += 1; }
    else if (j === y.length || (i < x.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) { parts.push(["removed", x[i]]); i += 1; }
    else { parts.push(["added", y[j]]); j += 1; }
  }
  return [...parts, ["same", a.slice(a.length - end).join("")]];
}
