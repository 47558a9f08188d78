// One answer on the page, from the first token to its counts; chats and comparisons share it.

import { ServerError, streamChat } from "./api.js";
import { readDial } from "./dial.js";
import { addText, count, el, keepingEnd, seconds } from "./dom.js";

const ENDS = { length: "cut off at the limit", stopped: "stopped" };

export class Answer {
  constructor(asked) {
    this.asked = asked;
    this.content = "";
    this.label = el("span", { class: "label" }, asked.name);
    this.thinkingName = el("summary", {}, "Thinking…");
    this.thinking = el("div", { class: "text" });
    this.fold = el("details", { class: "thinking" }, this.thinkingName, this.thinking);
    this.text = el("div", { class: "text" });
    this.failure = el("p", { class: "error", role: "alert" });
    this.note = el("p", { class: "hint" });
    this.counts = el("p", { class: "counts" });
    this.node = el("article", { class: "answer", "aria-busy": "true" });
    this.node.append(this.label, this.fold, this.text, this.failure, this.note, this.counts);
    this.label.hidden = !asked.name;
    this.fold.hidden = this.failure.hidden = this.note.hidden = true;
    this.colour(asked.lam);
  }

  /** Ask, and show what comes; resolves when it has ended, in whatever way. */
  async write(body, signal) {
    const since = performance.now();
    const tick = () => (this.counts.textContent = `writing… ${seconds(performance.now() - since)}`);
    const ticking = setInterval(tick, 100);
    tick();
    let end = "stop";
    try {
      for await (const chunk of streamChat({ ...body, ...this.asked.body }, signal)) {
        keepingEnd(() => this.take(chunk));
        end = chunk.choices?.[0]?.finish_reason ?? end;
      }
    } catch (error) {
      end = error.name === "AbortError" ? "stopped" : "failed";
      if (end === "failed") this.fail(error.message);
      if (end === "failed" && !(error instanceof ServerError)) throw error;
    } finally {
      clearInterval(ticking);
      this.node.setAttribute("aria-busy", "false");
      keepingEnd(() => this.close(end, performance.now() - since));
    }
    return end;
  }

  take(chunk) {
    if (chunk.dial) this.show(chunk.dial);
    if (chunk.usage) this.usage = chunk.usage;
    const delta = chunk.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning ?? delta.reasoning_content;
    if (thought) {
      addText(this.thinking, thought);
      this.fold.hidden = !this.thinking.firstChild;
    }
    if (delta.content) {
      this.content += delta.content;
      addText(this.text, delta.content);
    }
  }

  show(dial) {
    const { words, lam } = readDial(dial, this.asked);
    this.label.textContent = words;
    this.label.hidden = !words;
    this.colour(lam);
    if (dial.note) this.note.textContent = dial.note;
    this.note.hidden = !dial.note;
    this.rejected = dial.rejected_tokens;
  }

  colour(lam) {
    this.node.classList.toggle("at", lam !== undefined);
    if (lam !== undefined) this.node.style.setProperty("--mix", `${100 * Math.min(Math.max(lam, 0), 1)}%`);
  }

  fail(message) {
    this.failure.textContent = message;
    this.failure.hidden = false;
  }

  close(end, milliseconds) {
    const usage = this.usage;
    const thought = usage?.completion_tokens_details?.reasoning_tokens;
    this.thinkingName.textContent = thought === undefined ? "Thinking" : `Thinking · ${count(thought, "token")}`;
    const parts = usage ? [count(usage.completion_tokens, "token")] : [];
    if (this.rejected) parts.push(`${this.rejected} rejected`);
    parts.push(seconds(milliseconds));
    const how = ENDS[end] || (this.text.firstChild ? "" : "no answer");
    if (how) parts.push(how);
    this.counts.textContent = parts.join(" · ");
    this.counts.hidden = end === "failed";
  }
}
