// The chat: one conversation with one model.

import { find, make, tell } from "./dom.js";
import { answer, Chooser, foot } from "./answer.js";
import { colourChooser, TokenText } from "./tokens.js";

export function startChat(known) {
  const chooser = new Chooser("chat", known);
  const log = find("log");
  const input = find("chat-input");
  let messages = [];
  let texts = [];
  let colouring = "none";
  let running = null;

  find("chat-who").replaceChildren(chooser.element);
  const legend = make("div", {});
  find("chat-colour").replaceChildren(colourChooser("chat-colouring", colouring, (chosen) => {
    colouring = chosen;
    for (const text of texts) text.colour(chosen);
    legend.replaceChildren(texts.length ? texts.at(-1).legend() : "");
  }), legend);

  const bubble = (role, who) => {
    const text = make("div", { class: "text" });
    const element = make("div", { class: `said ${role}` }, make("div", { class: "who", text: who }), text);
    log.append(element);
    log.scrollTop = log.scrollHeight;
    return { element, text };
  };

  const busy = (on) => {
    find("chat-send").disabled = on;
    find("chat-stop").hidden = !on;
  };

  async function send() {
    const said = input.value.trim();
    if (!said || running) return;
    tell("");
    const mine = bubble("user", "you");
    mine.text.textContent = said;
    input.value = "";
    const theirs = bubble("assistant", chooser.title);
    theirs.text.classList.add("busy");
    const text = new TokenText(theirs.text);
    text.colouring = colouring;
    const asked = [...messages, { role: "user", content: said }];
    running = new AbortController();
    busy(true);
    try {
      const figures = await answer(chooser, asked, text, running.signal);
      texts.push(text);
      text.draw();
      theirs.element.append(foot(figures), text.table());
      legend.replaceChildren(text.legend());
      messages = [...asked, { role: "assistant", content: text.text }];
    } catch (error) {
      mine.element.remove();
      theirs.element.remove();
      input.value = said;
      tell(error.message);
    } finally {
      theirs.text.classList.remove("busy");
      log.scrollTop = log.scrollHeight;
      running = null;
      busy(false);
      input.focus();
    }
  }

  find("chat-form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  find("chat-stop").addEventListener("click", () => running?.abort());
  find("chat-clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    texts = [];
    log.replaceChildren();
    legend.replaceChildren();
    input.focus();
  });
}
