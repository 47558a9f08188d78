const MEASURES = [
  ["accuracy", "accuracy"],
  ["answered", "share that reaches an answer"],
  ["among", "accuracy among those"],
  ["gain", "gain over λ = 0"],
];
const budgetState = { measure: "accuracy", cap: null };
const gainAt = (setting, i) => (setting.budget.gain ? setting.budget.gain[i][0] + setting.budget.gain[i][1] : null);
const measured = (setting, measure, i) => (measure === "gain" ? gainAt(setting, i) : setting.budget[measure][i]);

function drawSurface(task, width) {
  const members = task.settings.filter((s) => s.budget);
  const narrow = width < 520;
  const [left, right, row] = [narrow ? 92 : 150, width - 4, 26];
  const bottom = members.length * row + 6;
  const step = (right - left) / task.caps.length;
  const picture = frame(width, bottom + 48, "Accuracy of every setting under every limit");
  const values = members.flatMap((s) => task.caps.map((_, i) => measured(s, budgetState.measure, i))).filter(known);
  const largest = Math.max(...values.map(Math.abs), 1e-9);
  const low = budgetState.measure === "gain" ? 0 : Math.min(...values, largest);
  members.forEach((setting, place) => {
    const y = place * row + 4;
    picture.append(draw("text", { class: "title", x: left - 10, y: y + 16, "text-anchor": "end" }, fullName(setting)));
    task.caps.forEach((cap, i) => {
      const value = measured(setting, budgetState.measure, i);
      const share = known(value) ? (Math.abs(value) - low) / (largest - low || 1) : 0;
      const hue = budgetState.measure === "gain" ? (value < 0 ? "--loss" : "--gain") : "--heat-high";
      const paint = known(value) ? `color-mix(in oklab, var(${hue}) ${(100 * share).toFixed(1)}%, var(--heat-low))` : "var(--faint)";
      const cell = draw("rect", { class: "cell", x: left + i * step, y, width: Math.max(1, step - 1), height: row - 2, style: `fill: ${paint}` });
      const parts = setting.budget.gain ? setting.budget.gain[i] : null;
      const lines = [
        `${fullName(setting)} within ${count(cap)} tokens`,
        `accuracy ${percent(setting.budget.accuracy[i])} % (${percent(setting.budget.low[i])} to ${percent(setting.budget.high[i])})`,
        `${percent(setting.budget.answered[i])} % reach an answer`,
        `${tokens(setting.budget.tokens[i])} tokens a response`,
      ];
      if (parts) lines.push(`gain ${signed(gainAt(setting, i))}: ${signed(parts[0])} no longer cut, ${signed(parts[1])} better answers`);
      cell.addEventListener("click", () => chooseCap(task, i));
      picture.append(hover(cell, lines));
    });
  });
  const every = Math.ceil(task.caps.length / Math.max(2, Math.floor((right - left) / 62)));
  task.caps.forEach((cap, i) => {
    if ((task.caps.length - 1 - i) % every === 0) picture.append(draw("text", { x: left + (i + 0.5) * step, y: bottom + 15, "text-anchor": "middle" }, count(cap)));
  });
  picture.append(draw("text", { class: "title", x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "limit on tokens"));
  picture.append(draw("rect", { class: "chosen", x: left + budgetState.cap * step - 1, y: 2, width: step + 1, height: members.length * row + 2 }));
  return picture;
}

function budgetTable(task) {
  const i = budgetState.cap;
  const members = task.settings.filter((s) => s.budget);
  const largest = Math.max(1e-9, ...members.flatMap((s) => (s.budget.gain ? s.budget.gain[i].map(Math.abs) : [])));
  const part = (value) => {
    const cell = el("td", {}, signed(value));
    const long = (4 * Math.abs(value)) / largest;
    cell.append(" ", el("span", { class: "bar", style: `width: ${long.toFixed(2)}em; background: var(${value < 0 ? "--loss" : "--gain"})`, "aria-hidden": "true" }));
    return cell;
  };
  const head = ["setting", "accuracy, %", "reach an answer, %", "accuracy among those, %", "tokens", "gain, points", "no longer cut", "better answers"];
  const rows = members.map((setting) => {
    const { budget } = setting;
    return el("tr", {},
      el("th", { scope: "row" }, fullName(setting)),
      el("td", {}, percent(budget.accuracy[i]), el("small", {}, `[${percent(budget.low[i])}, ${percent(budget.high[i])}]`)),
      el("td", {}, percent(budget.answered[i])),
      el("td", {}, percent(budget.among[i])),
      el("td", {}, tokens(budget.tokens[i])),
      el("td", {}, signed(gainAt(setting, i))),
      ...(budget.gain ? budget.gain[i].map(part) : [el("td", {}, "–"), el("td", {}, "–")]));
  });
  byId("budget-table").replaceChildren(tableHead(head), el("tbody", {}, ...rows));
}

function chooseCap(task, place) {
  budgetState.cap = place;
  byId("budget-cap").max = task.caps.length - 1;
  byId("budget-cap").value = place;
  byId("budget-cap-value").textContent = `${count(task.caps[place])} tokens`;
  byId("budget-cap").setAttribute("aria-valuetext", `${count(task.caps[place])} tokens`);
  byId("budget-surface").replaceChildren(drawSurface(task, byId("budget-surface").clientWidth));
  budgetTable(task);
}

function drawHard(task, width) {
  const members = task.settings.filter((s) => s.budget);
  const bases = members.filter((s) => s.row.lambda === 0);
  const [left, right, top, bottom, height] = [44, width - 14, 34, 348, 400];
  const xs = [...members.map((s) => s.row.tokens), ...bases.flatMap((s) => s.budget.tokens)];
  const ys = [...members.map((s) => s.row.accuracy), ...bases.flatMap((s) => [...s.budget.low, ...s.budget.high])];
  const [[x0, x1], [y0, y1]] = [padded(xs, 0.05, 0), padded(ys, 0.05, 0, 1)];
  const [x, y] = [scale(x0, x1, left, right), scale(y0, y1, bottom, top)];
  const picture = frame(width, height, "Settings against a hard limit on λ = 0");
  yAxis(picture, y, ticks(y0, y1, 6), left, right, (v) => percent(v, 0), "accuracy, %");
  xAxis(picture, x, ticks(x0, x1, width < 520 ? 4 : 8), bottom, lengthMark, "mean tokens a response");
  for (const { series, budget } of bases) {
    const at = (values) => values.map((value, i) => [x(budget.tokens[i]), y(value)]);
    picture.append(draw("path", { class: "band", style: colour(series), d: `${path([...at(budget.high), ...at(budget.low).reverse()])}Z` }));
    picture.append(draw("path", { class: "curve", style: colour(series), d: path(at(budget.accuracy)) }));
  }
  labels(picture, members.map((s) => [x(s.row.tokens), y(s.row.accuracy), settingName(s)]), [left, top - 8, right, bottom]);
  for (const s of members) picture.append(dot(x(s.row.tokens), y(s.row.accuracy), true, colour(s.series), describe(s)));
  return picture;
}

function hardTable(task) {
  const rows = task.settings.filter((s) => s.budget && s.budget.hard).map((setting) => {
    const { hard } = setting.budget;
    const [low, mean, high] = hard.advantage;
    return el("tr", {},
      el("th", { scope: "row" }, fullName(setting)),
      el("td", {}, tokens(setting.row.tokens)),
      el("td", {}, percent(setting.row.accuracy)),
      el("td", {}, count(hard.cap)),
      el("td", {}, tokens(hard.tokens)),
      el("td", {}, percent(hard.accuracy)),
      el("td", { class: low > 0 ? "above" : high < 0 ? "below" : null }, signed(mean), known(low) ? el("small", {}, `[${signed(low)}, ${signed(high)}]`) : null));
  });
  const head = ["setting", "tokens", "accuracy, %", "equal limit on λ = 0", "tokens then", "accuracy then, %", "difference, points"];
  byId("hard-table").replaceChildren(...(rows.length ? [tableHead(head), el("tbody", {}, ...rows)] : []));
}
