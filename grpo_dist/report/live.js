// Lets a page that `python -m grpo_dist watch` serves follow its runs. A reload keeps what the reader has chosen, and
// waits until the reader rests.

const REST_MILLISECONDS = 2000;
const SAVED = "grpo_dist live";

const inputs = () => [...document.querySelectorAll("input[id], select[id], details[id]")];
const propertyOf = (input) => (input.type === "checkbox" ? "checked" : input.matches("details") ? "open" : "value");
const valueOf = (input) => input[propertyOf(input)];
const usual = new Map(inputs().map((input) => [input.id, valueOf(input)]));
const status = make("p", { class: "note", role: "status", id: "live" }, "Follows the run.");
const now = make("button", { type: "button", id: "now", hidden: true, click: () => renew() }, "Show new steps");
document.getElementById("header").append(make("div", {}, status, now));
restore();

let touched = 0;
for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchstart"]) {
  document.addEventListener(kind, () => { touched = performance.now(); }, { passive: true });
}

const events = new EventSource("events");
events.addEventListener("open", () => { status.textContent = "Follows the run."; });
events.addEventListener("error", () => { status.textContent = "The server has ended: this page stays as it is."; });
events.addEventListener("message", ({ data: version }) => {
  if (version === data.live) return;
  now.hidden = false;
  if (!reads() && performance.now() - touched > REST_MILLISECONDS) renew();
});

/** Whether the reader is at something that a new page would take away: a text, or a list that changes its order. */
function reads() {
  const list = document.querySelector(".rows").getBoundingClientRect();
  return document.querySelector("dialog[open]") || !getSelection().isCollapsed || (list.top < innerHeight && list.bottom > 0);
}

function renew() {
  const chosen = inputs().filter((input) => valueOf(input) !== usual.get(input.id)).map((input) => [input.id, valueOf(input)]);
  const theme = document.documentElement.dataset.theme ?? "";
  sessionStorage.setItem(SAVED, JSON.stringify({ chosen, theme, top: scrollY }));
  location.reload();
}

function restore() {
  const saved = JSON.parse(sessionStorage.getItem(SAVED) ?? "null");
  sessionStorage.removeItem(SAVED);
  if (!saved) return;
  for (const [id, value] of saved.chosen) {
    const input = document.getElementById(id);
    if (!input) continue;
    input[propertyOf(input)] = value;
    for (const kind of ["input", "change", "toggle"]) input.dispatchEvent(new Event(kind, { bubbles: true }));
  }
  while ((document.documentElement.dataset.theme ?? "") !== saved.theme) document.getElementById("theme").click();
  requestAnimationFrame(() => scrollTo({ top: saved.top, behavior: "instant" }));
}
