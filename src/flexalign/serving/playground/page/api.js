// OpenAI's API on the server that this page comes from. The key lives in this variable alone.

let key = "";
export const setKey = (given) => (key = given);

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const sentence = (told) => told?.error?.message ?? told?.message;

async function request(path, options) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ServerError(sentence(told) ?? `The server answered with status ${response.status}.`, response.status);
}

/** The model that is served: its id and its dial, if it has one. */
export async function getModel() {
  const { data } = await (await request("v1/models", { method: "GET" })).json();
  if (!data?.length) throw new ServerError("The server names no model.");
  return data[0];
}

/** Yield the chunks of a chat's answer as they arrive. */
export async function* streamChat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let isWhole = false;
  while (true) {
    const { value, done } = await read(reader);
    const events = (buffer + (value ?? "")).split(/\r?\n\r?\n/);
    buffer = done ? "" : events.pop();
    for (const event of events) {
      const text = event.replace(/^data: ?/, "").trim();
      isWhole ||= text === "[DONE]";
      if (!text.startsWith("{")) continue;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new ServerError(sentence(chunk));
      yield chunk;
    }
    if (done) break;
  }
  if (!isWhole) throw new ServerError("The answer broke off: the server closed the connection.");
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The answer broke off: the server can no longer be reached.");
  }
}
