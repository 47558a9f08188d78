// A conversation; the dial may stand elsewhere at every turn.

import { Answer } from "./answer.js";
import { dialControl } from "./dial.js";
import { announce, byId, el, submitOnEnter, swap } from "./dom.js";
import { EXAMPLE, request } from "./settings.js";

export function startChat(model) {
  const turn = dialControl(model);
  const field = byId("question");
  const grow = submitOnEnter(field);
  const log = byId("log");
  const earlier = byId("earlier");
  const welcome = byId("welcome");
  let messages = [];
  let running = null;

  function setRunning(controller) {
    running = controller;
    if (controller) swap(byId("send"), byId("stop"));
    else swap(byId("stop"), byId("send"));
  }

  async function send() {
    const question = field.value.trim();
    if (!question || running) return;
    const controller = new AbortController();
    setRunning(controller);
    welcome.remove();
    const asked = el("div", { class: "question" }, el("span", { class: "unseen" }, "You: "), question);
    const answer = new Answer(turn());
    log.append(asked, answer.node);
    field.value = "";
    grow();
    window.scrollTo(0, document.documentElement.scrollHeight);
    announce("Writing…");
    const before = earlier.checked ? messages : [];
    const body = request(model, [...before, { role: "user", content: question }]);
    const end = await answer.write(body, controller.signal);
    if (running !== controller) return; // the conversation was cleared
    setRunning(null);
    const isKept = end !== "failed" && answer.content.trim();
    if (isKept) {
      messages.push({ role: "user", content: question }, { role: "assistant", content: answer.content });
    } else {
      asked.append(el("span", { class: "withdrawn" }, "not part of the conversation"));
      if (!field.value) field.value = question;
      grow();
    }
    announce(end === "failed" ? "No answer." : `Answered: ${answer.counts.textContent}`);
  }

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    running?.abort();
    field.focus();
  });
  byId("clear").addEventListener("click", () => {
    running?.abort();
    setRunning(null);
    messages = [];
    log.replaceChildren(welcome);
    field.focus();
  });
  byId("welcome-text").textContent = model.dial
    ? "Every answer says the λ it was written with, and what it cost."
    : "This model has no dial: serve it with an adapter, or beside an aligned model, to get one.";
  if (model.id.startsWith("miniature")) {
    earlier.checked = false; // it has learnt single questions
    const example = byId("example");
    example.textContent = EXAMPLE;
    example.hidden = false;
    example.addEventListener("click", () => {
      field.value = example.textContent;
      field.focus();
    });
  }
}
