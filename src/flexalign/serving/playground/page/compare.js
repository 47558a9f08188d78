// One prompt at several settings, side by side, with one seed: what differs is the dial.

import { Answer } from "./answer.js";
import { readSettings } from "./dial.js";
import { announce, byId, el, numeral, submitOnEnter, swap } from "./dom.js";
import { EXAMPLE, request } from "./settings.js";

const bar = () => el("div", { class: "bar", "aria-hidden": "true" }, el("i"), el("i"));

export function startCompare(model) {
  if (!model.dial) return;
  const [low, high] = model.dial.lambda_range;
  const failure = byId("list-error");
  let running = null;

  function setRunning(controller) {
    running = controller;
    if (controller) swap(byId("run"), byId("stop-all"));
    else swap(byId("stop-all"), byId("run"));
  }

  async function compare(question, settings) {
    const controller = new AbortController();
    setRunning(controller);
    const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
    const body = { seed, ...request(model, [{ role: "user", content: question }]) };
    const answers = settings.map((asked) => new Answer(asked));
    const bars = answers.map(bar);
    byId("columns").replaceChildren(...answers.map((answer) => answer.node));
    answers.forEach((answer, place) => answer.counts.before(bars[place]));
    announce(`Writing ${answers.length} answers…`);
    await Promise.allSettled(answers.map((answer) => answer.write(body, controller.signal)));
    drawBars(answers, bars);
    setRunning(null);
    announce(answers.map((answer) => `${answer.label.textContent}: ${answer.counts.textContent}`).join("; "));
  }

  byId("comparer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("prompt").value.trim();
    failure.hidden = true;
    if (!question || running) return;
    try {
      compare(question, readSettings(byId("settings-list").value, model));
    } catch (error) {
      failure.textContent = error.message;
      failure.hidden = false;
    }
  });
  byId("stop-all").addEventListener("click", () => running?.abort());
  submitOnEnter(byId("prompt"));
  const first = [0, 0.5, 1].filter((lam) => lam >= low && lam <= high);
  byId("settings-list").value = [...first, "auto"].join(", ");
  const effort = model.dial.effort ? ", effort 25" : "";
  byId("list-hint").textContent = `λ from ${numeral(low)} to ${numeral(high)}${effort}, or auto. All share one seed.`;
  if (model.id.startsWith("miniature")) byId("prompt").value = EXAMPLE;
}

/** Under each answer its tokens as a length, the thinking first; the longest is the whole width. */
function drawBars(answers, bars) {
  const most = Math.max(1, ...answers.map((answer) => answer.usage?.completion_tokens ?? 0));
  answers.forEach(({ usage }, place) => {
    const thought = usage?.completion_tokens_details?.reasoning_tokens ?? 0;
    const [thinking, rest] = bars[place].children;
    thinking.style.width = `${(100 * thought) / most}%`;
    rest.style.width = `${(100 * ((usage?.completion_tokens ?? 0) - thought)) / most}%`;
  });
}
