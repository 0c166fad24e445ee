// Puts the sections on the page.

for (const run of runs) run.curves = withAgreement(run);
if (runs.some((run) => run.agreement.step.length)) measured.push("agreement");

/** The curves of a run: its metrics, and the agreement of its completions, averaged over the steps of a point too. */
function withAgreement(run) {
  const point = (step) => Math.floor(step / data.steps_a_point);
  const at = Map.groupBy(run.agreement.step.keys(), (place) => point(run.agreement.step[place]));
  const mean = (places) => (places ? places.reduce((sum, place) => sum + run.agreement.share[place], 0) / places.length : null);
  return { ...run.curves, agreement: run.curves.step.map((step) => mean(at.get(point(step)))) };
}

header();
toolbar();
document.getElementById("main").append(learning(), answers(), curvePanels(), time(), completionsPanel(), config());
window.addEventListener("hashchange", followAddress);
followAddress();
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width !== state.width) set({ width: entry.contentRect.width });
}).observe(document.getElementById("main"));
