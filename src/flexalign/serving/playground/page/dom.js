// Text enters the page as text nodes alone: nothing that a model or a user writes is markup.

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const NARROW = "\u202f";
export const numeral = (value) => String(Number(value.toFixed(3))).replace("-", "−");
export const count = (number, noun) => `${number.toLocaleString("en-US")} ${noun}${number === 1 ? "" : "s"}`;
export const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 1000 ? 2 : 1)}${NARROW}s`;

/** Add a piece to a node's text, which does not begin with blanks. */
export function addText(node, piece) {
  if (node.firstChild) node.firstChild.appendData(piece);
  else if (piece.trimStart()) node.append(piece.trimStart());
}

export const announce = (text) => (byId("status").textContent = text);

/** Show one button in the place of another; the keyboard's focus goes along. */
export function swap(shown, coming) {
  const hadFocus = document.activeElement === shown;
  shown.hidden = true;
  coming.hidden = false;
  if (hadFocus) coming.focus();
}

/** Follow the end of a conversation, unless the reader has scrolled away from it. */
export function keepingEnd(change) {
  if (document.body.dataset.view !== "chat") return change();
  const page = document.documentElement;
  const isAtEnd = page.scrollHeight - page.clientHeight - window.scrollY < 80;
  change();
  if (isAtEnd) window.scrollTo(0, page.scrollHeight);
}

/** Let Enter send a form and Shift+Enter break the line; the field grows with its text. */
export function submitOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, window.innerHeight / 3)}px`;
  };
  field.addEventListener("input", grow);
  return grow;
}
