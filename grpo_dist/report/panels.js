// The sections of the page except the completions.

const SHARE = "share";
const TITLES = {
  "reward/mean": ["Reward"],
  "reward/std": ["Standard deviation of rewards"],
  "reward/groups_zero_std": ["Groups without signal", SHARE],
  "reward/unscored": ["Unscored completions", SHARE],
  "kl": ["KL to the reference", "nats per token"],
  "entropy": ["Entropy", "nats per token"],
  "completion/length_mean": ["Length", "tokens, mean"],
  "completion/length_max": ["Longest completion", "tokens"],
  "completion/truncated": ["Truncated completions", SHARE],
  "loss": ["Loss"],
  "grad_norm": ["Gradient norm"],
  "learning_rate": ["Learning rate"],
  "ratio/max": ["Largest ratio"],
  "rollout/kl": ["Rollout's distance from the trainer", "nats a token"],
  "rollout/update_share": ["Share of the update in the rollout", "share"],
  "rollout/logprob_gap_max": ["Gap of rollout and trainer", "nats, largest"],
  "rollout/router_agreement": ["Routers that agree with the rollout", SHARE],
  "rollout/tokens_per_second": ["Rollout speed", "tokens per second"],
  "rollout/draft_accepted": ["Drafted tokens that were drawn", SHARE],
  "time/step": ["Time of a step", "seconds"],
  "memory/peak_gib": ["Peak memory of rank 0", "GiB"],
  "tokens/useful_share": ["Useful share of computed tokens", SHARE],
};
const CURVES = ["kl", "entropy", "completion/length_mean", "completion/truncated", "reward/groups_zero_std",
  "reward/unscored", "loss", "grad_norm", "learning_rate", "ratio/max", "rollout/kl", "rollout/logprob_gap_max",
  "rollout/update_share", "rollout/router_agreement"];
const SPEED = ["time/step", "rollout/tokens_per_second", "rollout/draft_accepted", "memory/peak_gib", "tokens/useful_share"];
const PHASES = { rollout: "rollout", reward: "waiting for rewards", reference: "reference and old policy",
  update: "update", sync: "sync of the rollout weights", eval: "evaluation" };

const measured = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => name !== "step");
const has = (name) => measured.includes(name);

/** Charts of the measured metrics. One line lists those that never changed. */
function chartsOf(names) {
  const values = (name) => new Set(runs.flatMap((run) => run.curves[name] ?? []).filter((value) => value != null));
  const present = names.filter(has).map((name) => ({ name, values: values(name), caption: TITLES[name] ?? [name] }));
  const still = present.filter((each) => each.values.size < 2);
  return [make("div", { class: "grid" }, present.filter((each) => each.values.size > 1).map(({ name, caption: [title, unit] }) =>
    lineChart({ title, unit, metrics: [{ name }] }))),
  still.length ? make("p", { class: "note" }, "Never changed: ", still.map((each) => `${each.caption[0]} ${short([...each.values][0])}`).join(", "), ".") : null];
}

function header() {
  const one = runs.length === 1;
  const theme = make("button", { type: "button", id: "theme", click: () => {
    const next = { "": "dark", dark: "light", light: "" }[document.documentElement.dataset.theme ?? ""];
    document.documentElement.dataset.theme = next;
    theme.textContent = `Theme: ${next || "system"}`;
  } }, "Theme: system");
  const links = ["learning:Learning", "answers:Answers", "curves:Curves", "time:Time and memory", "completions:Completions",
    "config:Config"].map((each) => each.split(":"));
  document.getElementById("header").append(
    make("div", {}, make("h1", {}, one ? runs[0].name : `Comparison of ${runs.length} runs`),
      make("p", { class: "note" }, one ? runs[0].directory : runs.map((run) => run.name).join(", "), ` · written ${data.made}`)),
    make("nav", { "aria-label": "Sections" }, links.map(([id, text]) => make("a", { href: `#${id}` }, text)), theme),
  );
}

function toolbar() {
  const bar = document.getElementById("toolbar");
  const shown = make("output", { for: "step" });
  const step = make("input", { type: "range", id: "step", min: FIRST_STEP, max: LAST_STEP, value: LAST_STEP,
    input: () => set({ cursor: Number(step.value) }) });
  const smoothing = make("input", { type: "range", id: "smoothing", min: 0, max: 0.98, step: 0.02, value: state.smoothing,
    input: () => set({ smoothing: Number(smoothing.value) }) });
  const amount = make("output", { for: "smoothing" });
  const bound = (id, name) => make("input", { type: "number", id, min: FIRST_STEP, max: LAST_STEP, "aria-label": name,
    change: () => zoom(Number(from.value || FIRST_STEP), Number(until.value || LAST_STEP)) });
  const [from, until] = [bound("from", "First step of the curves"), bound("until", "Last step of the curves")];
  const everything = make("button", { type: "button", id: "everything", click: () => zoom(FIRST_STEP, LAST_STEP) }, "All steps");
  const log = make("input", { type: "checkbox", id: "log", change: () => set({ log: log.checked }) });
  bar.append(
    make("label", {}, "Step read out ", step, shown), make("label", {}, "Smoothing ", smoothing, amount),
    make("span", { class: "range", title: "Or drag over a curve; a double click shows all steps" }, "Curves from ", from, " to ", until, everything),
    make("label", {}, log, "Log scale"),
  );
  if (variants.length > 1) bar.append(legend());
  if (runs.length > 1) {
    const choice = make("select", { id: "run", change: () => set({ run: Number(choice.value) }) },
      runs.map((run, place) => make("option", { value: place }, run.name)));
    bar.append(make("label", {}, "Answers, times and completions of ", choice));
    watch(["run"], () => { choice.value = state.run; });
  }
  watch(["cursor"], () => {
    step.value = state.cursor ?? LAST_STEP;
    shown.textContent = state.cursor == null ? "last" : integer(state.cursor);
  });
  watch(["smoothing"], () => { amount.textContent = state.smoothing.toFixed(2); });
  watch(["range"], () => {
    [from.value, until.value] = shownRange();
    everything.disabled = state.range == null;
  });
}

function legend() {
  return make("fieldset", { class: "legend" }, make("legend", {}, "Runs"), variants.map((variant) => {
    const box = make("input", { type: "checkbox", id: `run-${variant.number}`, checked: true, change: () => {
      const hidden = new Set(state.hidden);
      if (box.checked) hidden.delete(variant.number); else hidden.add(variant.number);
      set({ hidden });
    } });
    return make("label", {}, box, swatch(variant.number % 8), variant.label);
  }));
}

/** Names and values that describe a run. */
function overview(run) {
  const steps = run.curves.step;
  const done = steps[steps.length - 1] ?? 0;
  const asked = run.config["train.num_train_steps"];
  const start = run.starts[run.starts.length - 1] ?? {};
  return [
    ["Steps", asked == null ? integer(done) : done >= asked ? `${integer(done)}, complete` : `${integer(done)} of ${integer(asked)}`],
    ["Model", written(run.config["model.name"])],
    ["Ranks", start.ranks ? `${start.ranks.length}, ${start.engine}` : NONE],
    ["Time in steps", duration((run.totals["time/step"] ?? 0) + (run.totals["time/eval"] ?? 0))],
    ["Completion tokens", short(run.totals["tokens/completion"] ?? 0)],
    ["Peak memory", run.totals["memory/peak_gib"] == null ? NONE : `${short(run.totals["memory/peak_gib"])} GiB`],
  ];
}

function verdict(change) {
  const moved = change.after > change.before ? "rose" : change.after < change.before ? "fell" : "unchanged";
  const word = change.is_clear == null ? "" : change.is_clear || moved === "unchanged" ? moved : "no clear change";
  const basis = change.window ? `mean of the first and the last ${change.window} steps`
    : `before and after training${change.prompts ? `, ${counted(change.prompts, "prompt")}` : ""}`;
  return make("div", { class: "verdict" },
    make("p", { class: `figures ${word.split(" ")[0]}` }, short(change.before), make("span", { class: "arrow" }, " → "), short(change.after),
      make("span", { class: "word" }, word)),
    make("p", { class: "note" }, basis));
}

function learning() {
  const cards = [["reward/mean", { title: "Reward", unit: "mean of the batch", metrics: [{ name: "reward/mean" }] }],
    ["eval/accuracy", { title: "Accuracy on held-out prompts", unit: SHARE,
      metrics: [{ name: "eval/accuracy", label: "sampled" }, { name: "eval/greedy_accuracy", label: "greedy" }] }],
  ].filter(([name]) => has(name)).map(([name, chart]) => make("div", {},
    runs.length === 1 && runs[0].changes[name] ? verdict(runs[0].changes[name]) : null, lineChart({ ...chart, small: false })));
  const about = runs.length > 1 ? comparison() : make("dl", { class: "overview" },
    overview(runs[0]).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  return section("learning", "Did it learn?", make("div", { class: "grid wide" }, cards), about, alarms());
}

function comparison() {
  const differing = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].filter((key) =>
    key !== "train.output_dir" && new Set(runs.map((run) => written(run.config[key]))).size > 1);
  const last = (run, name) => (run.curves[name] ?? []).filter((value) => value != null).pop();
  const moved = (run, name) => (run.changes[name] ? `${short(run.changes[name].before)} → ${short(run.changes[name].after)}` : NONE);
  const heads = ["Run", "Reward, first → last", "Held-out accuracy", "KL", "Length", "Tokens/s", "Steps", "Time", ...differing];
  const rows = runs.map((run) => {
    const about = Object.fromEntries(overview(run));
    return [make("span", {}, swatch(run.variant % 8), " ", run.name), moved(run, "reward/mean"), moved(run, "eval/accuracy"),
      short(last(run, "kl")), short(last(run, "completion/length_mean")), short(last(run, "rollout/tokens_per_second")),
      about.Steps, about["Time in steps"], ...differing.map((key) => written(run.config[key]))];
  });
  return table(heads, rows, { class: "numbers", label: "Comparison of the runs" });
}

function alarms() {
  const listed = runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
  const number = runs.reduce((sum, run) => sum + run.num_alarms, 0);
  if (!number) return null;
  return make("details", { class: "alarms", id: "alarms", open: true }, make("summary", {}, counted(number, "alarm")),
    make("ul", {}, listed.map(({ run, alarm }) => make("li", {}, runs.length > 1 ? `${run.name}, ` : "", `step ${alarm.step}: `,
      alarm.message ?? written(alarm), alarm.times > 1 ? ` (${integer(alarm.times)} such alarms, the last at step ${alarm.last_step})` : "",
      alarm.advice ? make("span", { class: "note" }, `. ${alarm.advice}`) : ""))));
}

function answers() {
  const note = make("p", { class: "note" });
  watch(["run"], () => {
    const run = runs[state.run];
    const { steps_read: read, num_steps: steps } = run.completions;
    note.textContent = !read ? without(run) : read < steps ? `From ${read} evenly spaced steps of ${integer(steps)}.` : `From every completion of ${counted(read, "step")}.`;
  });
  if (!runs.some((run) => run.maps.answers)) return section("answers", "What it answered", note);
  const map = (name) => (run) => run.maps[name];
  return section("answers", "What it answered", note, make("div", { class: "grid wide" },
    make("div", { class: "stack" }, heatMap({ title: "Answers over training", mapOf: map("answers"),
      note: "share of completions, earliest first" }),
    lineChart({ title: "Agreement within a group", unit: "share of its most frequent answer", metrics: [{ name: "agreement" }] })),
    make("div", { class: "stack" }, heatMap({ title: "Rewards over training", mapOf: map("rewards"), note: "share of completions" }),
      heatMap({ title: "Lengths over training", mapOf: map("lengths"), note: "share of completions, by tokens" }))));
}

function curvePanels() {
  const elsewhere = new Set([...CURVES, ...SPEED, "reward/mean", "eval/accuracy", "eval/greedy_accuracy", "epoch", "agreement"]);
  const rest = measured.filter((name) => !elsewhere.has(name)).sort();
  const more = make("div", {});
  const details = make("details", { id: "others", toggle: () => {
    if (details.open && !more.children.length) more.append(...chartsOf(rest).filter(Boolean));
  } }, make("summary", {}, `All other metrics (${rest.length})`), more);
  return section("curves", "Curves", ...chartsOf(CURVES),
    data.steps_a_point > 1 ? make("p", { class: "note" }, `A point is the mean of ${data.steps_a_point} steps.`) : null, details);
}

function time() {
  const bars = make("div", { class: "bars" });
  watch(["run"], () => {
    const { totals } = runs[state.run];
    const total = (name) => (totals[name] ?? 0) / Math.max(1, totals.steps);
    const phases = Object.entries(PHASES).map(([name, text]) => [text, total(`time/${name}`)]);
    const inStep = phases.slice(0, 5).reduce((sum, [, seconds]) => sum + seconds, 0);
    phases.splice(5, 0, ["everything else", Math.max(0, total("time/step") - inStep)]);
    const sum = phases.reduce((all, [, seconds]) => all + seconds, 0) || 1;
    bars.replaceChildren(...phases.map(([text, seconds]) => {
      const bar = make("i", {});
      bar.style.width = `${(100 * seconds) / sum}%`;
      return make("div", { class: "bar" }, make("span", {}, text), make("span", { class: "track" }, bar),
        make("span", { class: "value" }, duration(seconds)), make("span", { class: "value" }, percent(seconds / sum)));
    }));
  });
  return section("time", "Time and memory", make("figure", { class: "chart" }, caption("Where the time went", "per step, on rank 0"), bars),
  ...chartsOf(SPEED));
}

function config() {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const all = make("input", { type: "checkbox", id: "all-options", change: () => draw() });
  const holder = make("div", {});
  const draw = () => {
    const chosen = keys.filter((key) => all.checked || runs.some((run) => written(run.config[key]) !== written(data.defaults[key])));
    holder.replaceChildren(table(["Option", ...runs.map((run) => run.name), "Default"], chosen.map((key) =>
      [key, ...runs.map((run) => written(run.config[key])), written(data.defaults[key])]), { class: "wrapped", label: "Options" }));
  };
  draw();
  return section("config", "Config and environment", make("label", {}, all, ` Show all ${keys.length} options, not only those that differ from the defaults`),
    holder, make("h3", {}, "Environment"), runs.map(environment));
}

function environment(run) {
  if (!run.starts.length) return make("p", { class: "note" }, `${run.name}: no environment.jsonl was written.`);
  const rows = run.starts.map((start) => [start.started, `step ${start.first_step}`, start.engine, (start.ranks ?? []).join("; "),
    Object.entries(start.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ")]);
  return make("div", {}, runs.length > 1 ? make("h4", {}, run.name) : null,
    table(["Started", "From", "Engine", "Ranks", "Versions"], rows, { class: "wrapped", label: `Environment of ${run.name}` }));
}
