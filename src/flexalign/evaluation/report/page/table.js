const tableHead = (names) => el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name))));

function withInterval(value, interval, format, marked = false) {
  const [low, high] = interval || [null, null];
  const kind = marked && known(low) && known(high) ? (low > 0 ? "above" : high < 0 ? "below" : null) : null;
  const bounds = known(low) && known(high) ? el("small", {}, `[${format(low)}, ${format(high)}]`) : null;
  return el("td", { class: kind }, format(value), known(value) ? bounds : null);
}
function rowsTable(task) {
  const head = ["setting", "accuracy, %", "tokens", "thinking", "cut, %", "from chord", "from hull", "wrong", "cut off", "unparsed", "no answer", "questions", "samples"];
  const body = el("tbody");
  let before = null;
  for (const setting of task.settings) {
    const { row } = setting;
    if (several && setting.series !== before) body.append(el("tr", { class: "series" }, el("th", { colspan: head.length, scope: "rowgroup" }, setting.series)));
    before = setting.series;
    body.append(el("tr", {},
      el("th", { scope: "row" }, settingName(setting)),
      withInterval(row.accuracy, row.accuracy_ci, percent),
      withInterval(row.tokens, row.tokens_ci, tokens),
      el("td", {}, tokens(row.thinking_tokens)),
      withInterval(row.token_cut, row.token_cut_ci, percent),
      withInterval(row.chord_distance, row.chord_distance_ci, signed, true),
      withInterval(row.hull_distance, row.hull_distance_ci, signed, true),
      ...["wrong", "truncated", "unparsed", "no_answer"].map((name) => el("td", {}, percent(row[name]))),
      ...["n_questions", "n_samples"].map((name) => el("td", {}, known(row[name]) ? count(row[name]) : "–"))));
  }
  byId("rows").replaceChildren(tableHead(head), body);
}
function meansTable() {
  if (data.tasks.length < 2) return;
  const rows = data.means.map((mean) => el("tr", {},
    el("th", { scope: "row" }, [mean.run, mean.system, settingName({ row: mean })].filter(Boolean).join(" · ")),
    el("td", {}, percent(mean.accuracy)),
    el("td", {}, percent(mean.token_cut_mean)),
    el("td", {}, percent(mean.token_cut_pooled))));
  const head = ["mean over tasks", "accuracy, %", "cut: mean of the tasks' cuts, %", "cut: all tokens together, %"];
  byId("means").append(el("h3", {}, "Over all tasks"), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Means over tasks" }, el("table", {}, tableHead(head), el("tbody", {}, ...rows))));
}

function nested(value) {
  if (Array.isArray(value) && value.some((item) => item && typeof item === "object")) {
    return el("dl", {}, ...value.flatMap((item, i) => [el("dt", {}, String(i + 1)), el("dd", {}, nested(item))]));
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return el("dl", {}, ...Object.entries(value).flatMap(([name, inner]) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, nested(inner))]));
  }
  return Array.isArray(value) ? value.join(", ") : known(value) ? String(value) : "–";
}
function environment() {
  for (const run of data.runs) {
    const large = ([, value]) => value && typeof value === "object";
    const entries = Object.entries(run.environment);
    byId("environment-runs").append(
      el("h3", {}, run.label),
      nested(Object.fromEntries(entries.filter((entry) => !large(entry)))),
      ...entries.filter(large).map(([name, value]) => el("details", {}, el("summary", {}, name.replaceAll("_", " ")), nested(value))));
  }
}
