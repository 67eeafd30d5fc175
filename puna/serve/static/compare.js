// Two answers to one question, side by side.

import { find, make, tell } from "./dom.js";
import { answer, Chooser, foot } from "./answer.js";
import { colourChooser, TokenText } from "./tokens.js";

class Side {
  constructor(id, known, chosen) {
    this.chooser = new Chooser(id, known, chosen);
    this.place = make("div", { class: "text" });
    this.below = make("div", {});
    this.text = new TokenText(this.place);
    find(id).replaceChildren(this.chooser.element, this.place, this.below);
  }

  async ask(question, colouring, signal) {
    this.text = new TokenText(this.place);
    this.text.colouring = colouring;
    this.place.textContent = "";
    this.below.replaceChildren();
    this.place.classList.add("busy");
    try {
      const figures = await answer(this.chooser, [{ role: "user", content: question }], this.text, signal);
      this.text.draw();
      this.figures = figures;
      this.below.replaceChildren(this.text.legend(), foot(figures), this.text.table());
    } finally {
      this.place.classList.remove("busy");
    }
  }

  colour(colouring) {
    this.text.colour(colouring);
    if (this.figures) this.below.replaceChildren(this.text.legend(), foot(this.figures), this.text.table());
  }
}

// What can be said of the two: where they go apart, and what they cost.
function verdict(left, right) {
  const [first, second] = [left.text.tokens, right.text.tokens];
  const same = first.length === second.length ? first.length : Math.min(first.length, second.length);
  let place = 0;
  while (place < same && first[place].text === second[place].text) place += 1;
  const cost = right.figures.puna && left.figures.puna ? right.figures.puna.accounting.cost / left.figures.puna.accounting.cost : null;
  const costs = cost !== null && Number.isFinite(cost) ? ` The second cost ${cost.toFixed(2)} times the first.` : "";
  if (left.text.text === right.text.text) return `The two texts are the same.${costs}`;
  left.text.markApart(place);
  right.text.markApart(place);
  return `The texts go apart at token ${place + 1}.${costs}`;
}

export function startCompare(known) {
  const names = known.models.map((model) => model.id);
  const sides = [new Side("side-left", known, names[0]), new Side("side-right", known, names[1] ?? names[0])];
  let colouring = "entropy";
  let running = null;

  find("compare-colour").replaceChildren(colourChooser("compare-colouring", colouring, (chosen) => {
    colouring = chosen;
    for (const side of sides) side.colour(chosen);
  }));

  async function compare() {
    const question = find("compare-input").value.trim();
    if (!question || running) return;
    tell("");
    find("verdict").textContent = "";
    running = new AbortController();
    find("compare-send").disabled = true;
    find("compare-stop").hidden = false;
    try {
      await Promise.all(sides.map((side) => side.ask(question, colouring, running.signal)));
      find("verdict").textContent = verdict(...sides);
    } catch (error) {
      running.abort();
      tell(error.message);
    } finally {
      running = null;
      find("compare-send").disabled = false;
      find("compare-stop").hidden = true;
    }
  }

  find("compare-form").addEventListener("submit", (event) => { event.preventDefault(); compare(); });
  find("compare-input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); compare(); }
  });
  find("compare-stop").addEventListener("click", () => running?.abort());
}
