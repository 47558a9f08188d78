// Opens the server, with a key if it wants one, and shows the views.

import { getModel, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";
import { byId } from "./dom.js";

const door = byId("door");

function show(view) {
  byId("chat").hidden = view !== "chat";
  byId("compare").hidden = view !== "compare";
  byId("clear").hidden = view !== "chat";
  document.body.dataset.view = view;
}

async function open() {
  let model;
  try {
    model = await getModel();
  } catch (error) {
    const needsKey = error.status === 401;
    byId("door-reason").textContent = needsKey && !byId("key").value ? "This server asks for a key." : error.message;
    byId("door-key").hidden = !needsKey;
    byId("door-open").textContent = needsKey ? "Open" : "Try again";
    door.hidden = false;
    if (needsKey) byId("key").focus();
    return;
  }
  door.hidden = true;
  byId("key").value = "";
  byId("model").textContent = model.id;
  document.title = `${model.id} · flexalign playground`;
  byId("views").hidden = !model.dial;
  byId("foot").hidden = false;
  startChat(model);
  startCompare(model);
  show("chat");
  byId("question").focus();
}

door.addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  open();
});
byId("views").addEventListener("change", (event) => show(event.target.value));
open();
