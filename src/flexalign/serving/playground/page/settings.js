// What goes into every request beside its dial: the system prompt and the sampling in the fold.

import { byId } from "./dom.js";

/** What the miniature can be asked. */
export const EXAMPLE = "9+3+6+2?";

const NUMBERS = { temperature: "temperature", max_tokens: "max-tokens", seed: "seed" };

/** A request's body; what is left empty is left to the server. */
export function request(model, messages) {
  const system = byId("system").value.trim();
  const body = { model: model.id, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  for (const [name, id] of Object.entries(NUMBERS)) {
    if (byId(id).value !== "") body[name] = Number(byId(id).value);
  }
  return body;
}
