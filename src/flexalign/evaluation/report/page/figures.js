const spread = (settings, field, bounds) => settings.flatMap((setting) => [setting.row[field], ...(setting.row[bounds] || [])]);

function drawPareto(task, width) {
  const narrow = width < 520;
  const height = narrow ? 380 : 460;
  const [left, right, top, bottom] = [44, width - 14, 34, height - 52];
  const shapes = task.lines.flatMap((line) => [...(line.chord || []), ...line.hull]);
  const [x0, x1] = padded([...spread(task.settings, "tokens", "tokens_ci"), ...shapes.map((p) => p[0])], 0.07, 0);
  const [y0, y1] = padded([...spread(task.settings, "accuracy", "accuracy_ci"), ...shapes.map((p) => p[1])], 0.07, 0, 1);
  const [x, y] = [scale(x0, x1, left, right), scale(y0, y1, bottom, top)];
  const picture = frame(width, height, "Accuracy against tokens");
  const yMarks = ticks(y0, y1, 6);
  yAxis(picture, y, yMarks, left, right, (v) => percent(v, decimals(yMarks)), "accuracy, %");
  xAxis(picture, x, ticks(x0, x1, narrow ? 4 : 8), bottom, lengthMark, "mean tokens a response");
  const best = task.settings.filter((s) => s.frontier).map((s) => [s.row.tokens, s.row.accuracy]).sort((a, b) => a[0] - b[0]);
  const stairs = best.flatMap(([a, b], i) => (i ? [[a, best[i - 1][1]], [a, b]] : [[a, b]]));
  if (stairs.length > 1) picture.append(draw("path", { class: "frontier", d: path(stairs.map(([a, b]) => [x(a), y(b)])) }));
  for (const line of task.lines) {
    for (const kind of ["hull", "chord"]) {
      if (line[kind] && line[kind].length > 1) picture.append(draw("path", { class: kind, style: colour(line.series), d: path(line[kind].map(([a, b]) => [x(a), y(b)])) }));
    }
  }
  const places = [];
  for (const setting of task.settings) {
    const { row } = setting;
    const group = draw("g", { style: colour(setting.series) });
    whiskers(group, x, y, [row.tokens, row.accuracy], row.tokens_ci, row.accuracy_ci);
    picture.append(group);
    places.push([x(row.tokens), y(row.accuracy), settingName(setting)]);
  }
  labels(picture, places, [left, top - 8, right, bottom]);
  for (const setting of task.settings) {
    picture.append(dot(x(setting.row.tokens), y(setting.row.accuracy), setting.frontier, colour(setting.series), describe(setting)));
  }
  return picture;
}

function drawDial(task, width) {
  const lams = [...new Set(task.settings.map((s) => s.row.lambda).filter(known))].sort((a, b) => a - b);
  const others = [...new Set(task.settings.filter((s) => !known(s.row.lambda)).map(settingName))];
  const [left, edge] = [44, width - 14];
  const room = others.length ? Math.min(0.45 * (edge - left), 90 * others.length) : 0;
  const right = edge - room;
  const panel = 200;
  const height = 2 * panel + 110;
  const picture = frame(width, height, "Accuracy and tokens along the dial");
  const [l0, l1] = lams.length ? padded(lams, 0.05) : [0, 1];
  const x = scale(l0, l1, left, lams.length ? right : left);
  const place = (setting) => (known(setting.row.lambda) ? x(setting.row.lambda) : right + ((others.indexOf(settingName(setting)) + 0.6) / others.length) * room);
  const panels = [
    ["accuracy", "accuracy_ci", "accuracy, %", padded(spread(task.settings, "accuracy", "accuracy_ci"), 0.08, 0, 1), percent, 34],
    ["tokens", "tokens_ci", "mean tokens a response", [0, padded(spread(task.settings, "tokens", "tokens_ci"), 0.08)[1]], lengthMark, panel + 78],
  ];
  for (const [field, bounds, title, [low, high], format, top] of panels) {
    const y = scale(low, high, top + panel - 34, top);
    const marks = ticks(low, high, 4);
    yAxis(picture, y, marks, left, edge, field === "accuracy" ? (v) => percent(v, decimals(marks)) : format, title);
    for (const series of seriesNames) {
      const members = task.settings.filter((s) => s.series === series);
      const along = members.filter((s) => known(s.row.lambda)).map((s) => [place(s), y(s.row[field])]);
      picture.append(draw("path", { class: "curve", style: colour(series), d: path(along) }));
      for (const setting of members) {
        const group = draw("g", { style: colour(series) });
        whiskers(group, (v) => v, y, [place(setting), setting.row[field]], null, setting.row[bounds]);
        picture.append(group, dot(place(setting), y(setting.row[field]), true, colour(series), describe(setting)));
      }
    }
  }
  const floor = panels[1][5] + panel - 34;
  if (lams.length) {
    const marks = ticks(l0, l1, width < 520 ? 5 : 10);
    xAxis(picture, x, marks, floor, (v) => minus(String(Number(v.toFixed(3)))), "λ");
  }
  others.forEach((name, i) => {
    const at = right + ((i + 0.6) / others.length) * room;
    picture.append(draw("text", { x: at, y: floor + 18 + (i % 2) * 15, "text-anchor": "middle" }, name));
  });
  return picture;
}

function drawLengths(task, width) {
  const members = task.settings.filter((s) => s.histogram);
  const narrow = width < 520;
  const [left, right] = [narrow ? 4 : 150, width - 56];
  const strip = narrow ? 66 : 46;
  const bottom = members.length * strip + 8;
  const x = scale(0, task.edges[task.edges.length - 1], left, right);
  const picture = frame(width, bottom + 50, "Lengths of responses");
  xAxis(picture, x, ticks(0, x.high, narrow ? 4 : 8), bottom, lengthMark, "tokens a response", bottom - 8);
  members.forEach((setting, place) => {
    const base = (place + 1) * strip;
    const bins = task.edges.slice(0, -1).map((_, i) => data.statuses.map((status) => setting.histogram[status][i]));
    const tallest = Math.max(...bins.map((bin) => bin.reduce((a, b) => a + b, 0)), 1);
    const total = bins.flat().reduce((a, b) => a + b, 0);
    const name = draw("text", { class: "title", x: narrow ? left : left - 10, y: narrow ? base - 42 : base - 6, "text-anchor": narrow ? "start" : "end" }, fullName(setting));
    picture.append(name, draw("line", { class: "axis", x1: left, x2: right, y1: base, y2: base }));
    bins.forEach((bin, i) => {
      let top = base;
      const group = draw("g");
      bin.forEach((number, kind) => {
        if (!number) return;
        const high = (number / tallest) * 36;
        top -= high;
        group.append(draw("rect", { x: x(task.edges[i]) + 0.5, y: top, width: Math.max(1, x(task.edges[i + 1]) - x(task.edges[i]) - 1), height: high, fill: `var(--${data.statuses[kind]})` }));
      });
      const lines = bin.map((number, kind) => (number ? `${count(number)} ${STATUS_NAMES[data.statuses[kind]]}` : null)).filter(known);
      if (lines.length) picture.append(hover(group, [`${fullName(setting)}: ${count(task.edges[i])} to ${count(task.edges[i + 1] - 1)} tokens`, ...lines, `of ${count(total)} responses`]));
    });
    const mean = x(setting.row.tokens);
    picture.append(draw("line", { class: "mean", x1: mean, x2: mean, y1: base - 38, y2: base }));
    picture.append(draw("text", { x: right + 8, y: base - 6 }, tokens(setting.row.tokens)));
  });
  return picture;
}
