const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const STATUS_NAMES = {
  correct: "correct",
  wrong: "wrong",
  unparsed: "no answer made out",
  no_answer: "no answer",
  truncated: "cut off",
};

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

const known = (value) => value !== null && value !== undefined;
const minus = (text) => text.replace(/^-/, "−");
function fixed(value, digits) {
  const text = value.toFixed(digits);
  return minus(Number(text) === 0 ? text.replace("-", "") : text);
}
const percent = (share, digits = 1) => (known(share) ? fixed(100 * share, digits) : "–");
const signed = (share, digits = 1) => {
  if (!known(share)) return "–";
  const text = percent(share, digits);
  return Number(text) > 0 ? `+${text}` : text;
};
const count = (value) => Math.round(value || 0).toLocaleString("en-US");
const tokens = (value) => (!known(value) ? "–" : value >= 100 ? count(value) : fixed(value, 1));
const range = (pair, format) => (pair && known(pair[0]) && known(pair[1]) ? `${format(pair[0])} to ${format(pair[1])}` : "");
const settingName = (setting) => setting.row.label.replace(/λ\s*=\s*/g, "λ\u00a0=\u00a0").replace(/\u00a0-/g, "\u00a0−");

const seriesNames = [...new Set(data.tasks.flatMap((task) => task.settings.map((setting) => setting.series)))];
const colour = (series) => `--c: var(--series-${seriesNames.indexOf(series) % 6})`;
const several = seriesNames.length > 1;
const fullName = (setting) => (several ? `${setting.series}, ${settingName(setting)}` : settingName(setting));

const tip = byId("tip");
function showTip(node, lines) {
  tip.replaceChildren(el("strong", {}, lines[0]), ...lines.slice(1).map((line) => el("span", {}, line)));
  tip.hidden = false;
  const box = node.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const page = document.documentElement.clientWidth;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), page - own.width - 8);
  const above = box.top - own.height - 8;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
}
const hideTip = () => (tip.hidden = true);
function hover(node, lines, anchor = node) {
  node.addEventListener("pointerenter", () => showTip(anchor, lines));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => showTip(anchor, lines));
  node.addEventListener("blur", hideTip);
  return node;
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

function choice(fieldset, name, options, chosen, onChange) {
  for (const [value, text] of options) {
    const input = el("input", { type: "radio", name, value, checked: value === chosen ? "" : null });
    input.addEventListener("change", () => onChange(value));
    fieldset.append(el("label", {}, input, el("span", {}, text)));
  }
}
function legend(id, entries) {
  const swatch = (style, ...marks) => draw("svg", { viewBox: "0 0 26 14", style, "aria-hidden": "true" }, ...marks);
  byId(id).replaceChildren(...entries.map(([text, style, ...marks]) => el("span", {}, swatch(style, ...marks), text)));
}
const lineMark = (kind) => draw("line", { class: kind, x1: 0, x2: 26, y1: 7, y2: 7 });
const dotMark = (kind) => draw("circle", { class: `dot ${kind}`, cx: 13, cy: 7, r: 4.5 });
const boxMark = (colourName) => draw("rect", { x: 7, y: 1, width: 12, height: 12, rx: 2, fill: `var(--${colourName})` });
const seriesEntries = () => seriesNames.map((name) => [name, colour(name), lineMark("curve"), dotMark("full")]);
