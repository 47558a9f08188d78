// Settings of the dial: how one is called, how it is read from text, and the control that turns it.

import { byId, el, numeral } from "./dom.js";

const inside = (value, [low, high]) => Math.min(Math.max(value, low), high);

/** A setting: what it is called, and what of it goes into a request's body. */
export const setting = {
  none: { name: "", body: {} },
  auto: { name: "auto", body: { lambda: "auto" } },
  lambda: (lam) => ({ name: `λ = ${numeral(lam)}`, body: { lambda: lam }, lam }),
  effort: (effort) => ({ name: `effort ${numeral(effort)}`, body: { effort } }),
};

/** What an answer says of its dial, in words, and the λ it was written with, if that is one number. */
export function readDial(dial, asked) {
  const lam = typeof dial.lambda === "number" ? dial.lambda : undefined;
  const written = lam === undefined ? [] : [`λ = ${numeral(lam)}`];
  let words = [asked.name || "schedule"];
  if (dial.policy === "fixed") words = dial.effort === undefined ? written : [asked.name, ...written];
  else if (dial.policy === "adaptive" || dial.policy === "route") {
    words = [asked.name || dial.policy, ...(dial.route ? [dial.route] : []), ...written];
  }
  return { words: words.join(" · "), lam };
}

/** Read "0, 0.5, auto, effort 25"; throws a sentence about what cannot be read. */
export function readSettings(text, model) {
  const [low, high] = model.dial.lambda_range;
  const parts = text.split(/[,;\n]/).map((part) => part.trim()).filter(Boolean);
  if (parts.length < 1 || parts.length > 8) throw new Error("Give one to eight settings, with commas between them.");
  return parts.map((part) => {
    if (part === "auto") return setting.auto;
    const [, isEffort, digits] = part.replace("−", "-").match(/^(effort\s*)?([-+]?(?:\d+\.?\d*|\.\d+))$/) ?? [];
    if (digits === undefined) throw new Error(`“${part}” is no setting; write a number${model.dial.effort ? ", effort 25" : ""} or auto.`);
    const value = Number(digits);
    if (isEffort) {
      if (!model.dial.effort) throw new Error("No adapter is calibrated here, so that effort has no meaning; give λ.");
      return setting.effort(value);
    }
    if (value < low || value > high) throw new Error(`λ = ${numeral(value)} is outside this server’s range, ${numeral(low)} to ${numeral(high)}.`);
    if (model.dial.only_ends && value !== low && value !== high) throw new Error(`This server’s adapter has λ = ${numeral(low)} and λ = ${numeral(high)} alone.`);
    return setting.lambda(value);
  });
}

const HINTS = {
  lambda: "0 is the reference, which thinks longest; 1 is aligned.",
  effort: "100 writes the reference’s tokens; 0 is the fastest.",
  auto: "A fast answer first; it thinks only where that one is unsure.",
};

/** Set the control up for a model; returns what reads the setting it stands at. */
export function dialControl(model) {
  if (!model.dial) return () => setting.none;
  const range = model.dial.lambda_range;
  const start = model.dial.default;
  const values = { lambda: inside(start?.lambda ?? 0, range), effort: 50 };
  const ranges = { lambda: range, effort: [0, 100] };
  const marks = { lambda: { 0: "0 reference", 1: "1 aligned" }, effort: { 0: "0 fastest", 100: "100 reference" } };
  const slider = byId("slider");
  const exact = byId("exact");
  const modes = document.querySelectorAll("input[name=mode]");
  const mode = () => [...modes].find((radio) => radio.checked).value;

  function show() {
    const now = mode();
    const isAuto = now === "auto";
    byId("dial-slide").hidden = exact.hidden = isAuto;
    byId("dial-hint").textContent = HINTS[now];
    if (isAuto) return;
    const [low, high] = ranges[now];
    const onlyEnds = now === "lambda" && model.dial.only_ends;
    const step = onlyEnds ? high - low : now === "effort" ? 5 : high - low > 4 ? 0.1 : 0.05;
    // Steps count from the least value: one on the grid keeps 0 and 1 on it.
    Object.assign(slider, { min: Math.floor(low / step + 1e-9) * step, max: high, step, value: values[now] });
    Object.assign(exact, { min: low, max: high, value: values[now] });
    slider.ariaLabel = now === "lambda" ? "λ" : "effort";
    exact.ariaLabel = `${slider.ariaLabel}, exactly`;
    const place = (value) => (value - slider.min) / (high - slider.min || 1);
    const isWide = place(now === "lambda" ? 1 : 100) - place(0) > 0.25;
    byId("dial-slide").style.setProperty("--zero", `${100 * place(0)}%`);
    byId("dial-slide").style.setProperty("--one", `${100 * place(now === "lambda" ? 1 : 100)}%`);
    byId("dial-slide").dataset.mode = now;
    byId("dial-marks").replaceChildren(
      ...Object.entries(marks[now])
        .filter(([value]) => Number(value) >= low && Number(value) <= high)
        .map(([value, text]) => {
          const at = place(Number(value));
          const mark = el("span", {}, isWide ? text : value);
          mark.style.setProperty("--at", at);
          mark.style.setProperty("--shift", at < 0.1 ? 0 : at > 0.9 ? 1 : 0.5);
          return mark;
        }),
    );
  }

  slider.addEventListener("input", () => {
    values[mode()] = exact.value = inside(Number(Number(slider.value).toFixed(3)), ranges[mode()]);
  });
  exact.addEventListener("change", () => {
    if (exact.value !== "") values[mode()] = inside(Number(exact.value), ranges[mode()]);
    slider.value = exact.value = values[mode()];
  });
  modes.forEach((radio) => radio.addEventListener("change", show));
  byId("dial-effort").hidden = !model.dial.effort;
  if (start?.policy === "adaptive") document.querySelector("input[name=mode][value=auto]").checked = true;
  byId("dial").hidden = false;
  show();
  return () => (mode() === "auto" ? setting.auto : setting[mode()](values[mode()]));
}
