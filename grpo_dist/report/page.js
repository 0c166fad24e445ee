// Puts the sections on the page.

for (const run of runs) run.curves = withAgreement(run);
if (runs.some((run) => run.agreement.step.length)) measured.push("agreement");

/** The curves of a run: its metrics, and the agreement of its completions. */
function withAgreement(run) {
  const point = (step) => Math.floor(step / data.steps_a_point);
  const at = new Map(run.agreement.step.map((step, place) => [point(step), run.agreement.share[place]]));
  return { ...run.curves, agreement: run.curves.step.map((step) => at.get(point(step)) ?? null) };
}

header();
toolbar();
document.getElementById("main").append(learning(), answers(), curvePanels(), time(), completionsPanel(), config());
window.addEventListener("hashchange", followAddress);
followAddress();
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width !== state.width) set({ width: entry.contentRect.width });
}).observe(document.getElementById("main"));
