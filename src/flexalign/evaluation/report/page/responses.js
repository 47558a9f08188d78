const view = { place: 0, sample: 0, words: "", filter: "all" };
const FILTERS = [
  ["all", "all questions"],
  ["differ", "settings disagree"],
  ["failed", "some response is not correct"],
];
const right = (response) => response.status === "correct";
const kept = {
  all: () => true,
  differ: (question) => question.responses.some(right) && !question.responses.every(right),
  failed: (question) => !question.responses.every(right),
};

function found(task) {
  const words = view.words.toLowerCase();
  return data.responses.questions.filter((question) =>
    question.task === task.name && kept[view.filter](question) && (!words || `${question.id} ${question.problem}`.toLowerCase().includes(words)));
}
function card(setting, response) {
  const name = fullName(setting);
  const length = `${count(response.tokens)} tokens${response.thinkingTokens ? `, ${count(response.thinkingTokens)} of them thinking` : ""}${response.route ? `, ${response.route} way` : ""}`;
  const thinking = response.thinking.trim();
  return el("section", { class: "card" },
    el("h4", {}, name, el("span", { class: "status", style: `--c: var(--${response.status})` }, STATUS_NAMES[response.status] || response.status)),
    el("p", { class: "meta" }, length, known(response.extracted) ? `; answer ${response.extracted}` : ""),
    thinking ? el("details", {}, el("summary", {}, response.closed ? "Thinking" : "Thinking, never closed"), el("pre", { class: "text", tabindex: 0 }, thinking)) : null,
    el("pre", { class: "text", tabindex: 0 }, response.answer.trim() || "(nothing after the thinking)"));
}
function showQuestion(task) {
  const questions = found(task);
  view.place = Math.max(0, Math.min(view.place, questions.length - 1));
  const question = questions[view.place];
  const picker = byId("pick-question");
  picker.replaceChildren(...questions.map((entry, i) => el("option", { value: i, selected: i === view.place ? "" : null }, `${entry.id}: ${entry.problem.slice(0, 90)}`)));
  byId("step-back").disabled = view.place === 0;
  byId("step-on").disabled = view.place >= questions.length - 1;
  if (!question) {
    byId("responses-question").replaceChildren("No question here fits; widen the search.");
    byId("responses-cards").replaceChildren();
    byId("pick-sample").replaceChildren();
    return;
  }
  const samples = [...new Set(question.responses.map((response) => response.sample))].sort((a, b) => a - b);
  if (!samples.includes(view.sample)) view.sample = samples[0];
  byId("pick-sample").replaceChildren(...samples.map((n) => el("option", { value: n, selected: n === view.sample ? "" : null }, String(n + 1))));
  byId("responses-question").replaceChildren(el("pre", { class: "text", tabindex: 0 }, question.problem), el("p", { class: "note" }, `Known answer: ${question.gold}`));
  byId("responses-cards").replaceChildren(...question.responses.filter((response) => response.sample === view.sample).map((response) => card(task.settings[response.setting], response)));
}
function responseControls(current) {
  const show = () => showQuestion(current());
  const search = el("input", { type: "search", placeholder: "words of a question" });
  search.addEventListener("input", () => { view.words = search.value; view.place = 0; show(); });
  const filter = el("select", {}, ...FILTERS.map(([value, text]) => el("option", { value }, text)));
  filter.addEventListener("change", () => { view.filter = filter.value; view.place = 0; show(); });
  const picker = el("select", { id: "pick-question" });
  picker.addEventListener("change", () => { view.place = Number(picker.value); show(); });
  const sample = el("select", { id: "pick-sample" });
  sample.addEventListener("change", () => { view.sample = Number(sample.value); show(); });
  const back = el("button", { id: "step-back", type: "button" }, "Previous");
  const on = el("button", { id: "step-on", type: "button" }, "Next");
  back.addEventListener("click", () => { view.place -= 1; show(); });
  on.addEventListener("click", () => { view.place += 1; show(); });
  byId("responses-controls").append(
    el("label", {}, "Search", search), el("label", {}, "Which", filter), el("label", { class: "wide" }, "Question", picker), el("label", {}, "Sample", sample), back, on);
  const [questions, responses] = data.responses.shown;
  const [allQuestions, allResponses] = data.responses.total;
  const rest = responses < allResponses ? " The others are in samples.jsonl beside this page." : "";
  byId("responses-note").textContent = `${count(questions)} of ${count(allQuestions)} questions and ${count(responses)} of ${count(allResponses)} responses are in this page.${rest}`;
}
