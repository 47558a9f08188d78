function scale(low, high, from, to) {
  const span = high - low || 1;
  const map = (value) => from + ((value - low) / span) * (to - from);
  map.low = low;
  map.high = high;
  return map;
}
function ticks(low, high, about) {
  const raw = (high - low || 1) / Math.max(1, about);
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= raw);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n += 1) found.push(n * step || 0);
  return found;
}
function padded(values, share, floor = -Infinity, ceiling = Infinity) {
  const finite = values.filter((value) => known(value) && Number.isFinite(value));
  const low = Math.min(...finite);
  const high = Math.max(...finite);
  const room = (high - low || Math.abs(high) || 1) * share;
  return [Math.max(floor, low - room), Math.min(ceiling, high + room)];
}
const lengthMark = (value) => (Number.isInteger(value) ? count(value) : tokens(value));
const decimals = (marks) => (marks.length > 1 && Math.abs(100 * (marks[1] - marks[0])) < 0.999 ? 1 : 0);

function frame(width, height, name) {
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": name });
}
function xAxis(picture, x, marks, y, format, title, height = 0) {
  for (const mark of marks) {
    if (height) picture.append(draw("line", { class: "grid", x1: x(mark), x2: x(mark), y1: y - height, y2: y }));
    picture.append(draw("text", { x: x(mark), y: y + 18, "text-anchor": "middle" }, format(mark)));
  }
  const [left, right] = [x(x.low), x(x.high)];
  picture.append(draw("line", { class: "axis", x1: left, x2: right, y1: y, y2: y }));
  if (title) picture.append(draw("text", { class: "title", x: (left + right) / 2, y: y + 40, "text-anchor": "middle" }, title));
}
function yAxis(picture, y, marks, left, right, format, title) {
  for (const mark of marks) {
    picture.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(mark), y2: y(mark) }));
    picture.append(draw("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, format(mark)));
  }
  if (title) picture.append(draw("text", { class: "title", x: 0, y: y(y.high) - 12 }, title));
}
const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(2)} ${b.toFixed(2)}`).join("");

function whiskers(group, x, y, at, across, upright) {
  const pair = (value) => value && known(value[0]) && known(value[1]);
  if (pair(across)) group.append(draw("line", { class: "whisker", x1: x(across[0]), x2: x(across[1]), y1: y(at[1]), y2: y(at[1]) }));
  if (pair(upright)) group.append(draw("line", { class: "whisker", x1: x(at[0]), x2: x(at[0]), y1: y(upright[0]), y2: y(upright[1]) }));
}
function dot(x, y, full, style, lines) {
  const mark = draw("circle", { class: full ? "dot full" : "dot", cx: x, cy: y, r: 5 });
  const group = draw("g", { class: "point", style, tabindex: 0, role: "img", "aria-label": lines.join(", ") }, mark);
  return hover(group, lines, mark);
}
function describe(setting) {
  const row = setting.row;
  const lines = [
    fullName(setting),
    `accuracy ${percent(row.accuracy)} %${range(row.accuracy_ci, percent) && ` (${range(row.accuracy_ci, percent)})`}`,
    `${tokens(row.tokens)} tokens${range(row.tokens_ci, tokens) && ` (${range(row.tokens_ci, tokens)})`}`,
  ];
  if (known(row.token_cut) && row.lambda !== 0) lines.push(`${percent(row.token_cut)} % fewer tokens than λ = 0`);
  if (known(row.chord_distance)) lines.push(`${signed(row.chord_distance)} points from the chord`);
  return lines;
}

// Labels beside points: the first place that covers neither a point nor another label.
function labels(picture, points, bounds) {
  const taken = points.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const hits = (a) => taken.filter((b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1]).length;
  for (const [x, y, text] of points) {
    const wide = 6.6 * text.length;
    const places = [];
    for (const [dy, near] of [[-8, 8], [17, 8], [4, 11]]) places.push([x + near, y + dy, "start"], [x - near, y + dy, "end"]);
    for (const dy of [-13, 22, -28, 36]) places.push([x, y + dy, "middle"]);
    const scored = places.map(([px, py, anchor]) => {
      const left = anchor === "start" ? px : anchor === "end" ? px - wide : px - wide / 2;
      const box = [left, py - 11, left + wide, py + 3];
      const outside = box[0] < bounds[0] || box[2] > bounds[2] || box[1] < bounds[1] || box[3] > bounds[3];
      return { px, py, anchor, box, cost: hits(box) + (outside ? 2 : 0) };
    });
    const best = scored.reduce((a, b) => (b.cost < a.cost ? b : a));
    taken.push(best.box);
    picture.append(draw("text", { class: "label", x: best.px, y: best.py, "text-anchor": best.anchor, "aria-hidden": "true" }, text));
  }
}
