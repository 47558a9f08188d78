let task = data.tasks[0];

function drawAll() {
  const put = (id, make) => byId(id).replaceChildren(make(task, byId(id).clientWidth));
  hideTip();
  put("pareto-chart", drawPareto);
  put("dial-chart", drawDial);
  put("lengths-chart", drawLengths);
  put("hard-chart", drawHard);
  chooseCap(task, budgetState.cap);
}
function showTask(name) {
  task = data.tasks.find((candidate) => candidate.name === name);
  budgetState.cap = task.caps.length - 1;
  view.place = 0;
  drawAll();
  rowsTable(task);
  hardTable(task);
  showQuestion(task);
}

const names = data.tasks.map((candidate) => candidate.name);
byId("lead").textContent = `${seriesNames.join(", ")} on ${names.join(", ")}: ${data.tasks.reduce((sum, each) => sum + each.settings.length, 0)} measured settings.`;
byId("notes").append(...(data.notes ?? []).map((note) => el("p", { class: "note" }, note)));
if (names.length > 1) {
  byId("tasks").hidden = false;
  choice(byId("tasks"), "task", names.map((name) => [name, name]), names[0], showTask);
}
choice(byId("budget-measure"), "measure", MEASURES, "accuracy", (measure) => {
  budgetState.measure = measure;
  chooseCap(task, budgetState.cap);
});
byId("budget-cap").addEventListener("input", (event) => chooseCap(task, Number(event.target.value)));
const plain = "--c: var(--soft)";
legend("pareto-legend", [...seriesEntries().map(([name, style, , mark]) => [name, style, mark]), ["chord", plain, lineMark("chord")], ["hull", plain, lineMark("hull")], ["frontier", plain, lineMark("frontier")]]);
legend("dial-legend", several ? seriesEntries() : []);
legend("lengths-legend", data.statuses.map((status) => [STATUS_NAMES[status], null, boxMark(status)]));
legend("hard-legend", seriesNames.map((name) => [several ? `λ = 0 of ${name} under every limit` : "λ = 0 under every limit", colour(name), lineMark("curve")]));
responseControls(() => task);
meansTable();
environment();
showTask(names[0]);

let width = document.body.clientWidth;
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  drawAll();
}).observe(document.body);
