// Tokens as coloured text: by entropy, by where they came from, or by whether a verifier took them.
// Colour is never the only sign: the lines below tokens differ, and a table tells the same in words.

import { make } from "./dom.js";

export const COLOURINGS = { none: "plain", entropy: "entropy", source: "source", acceptance: "acceptance" };
const BITS = [0.25, 1, 2, 3.5, 5]; // where the five shades of entropy begin

function shade(bits) {
  return BITS.filter((edge) => bits >= edge).length;
}

function classOf(token, colouring, sources) {
  if (colouring === "entropy" && token.entropy !== null) return `h${shade(token.entropy)}`;
  if (colouring === "source") return `s${1 + (sources.indexOf(token.source) % 6)}`;
  if (colouring === "acceptance" && token.accepted !== null) return token.accepted ? "yes" : "no";
  return "";
}

function words(token) {
  const parts = [`from ${token.source}`];
  if (token.entropy !== null) parts.push(`${token.entropy.toFixed(2)} bits of entropy`);
  if (token.accepted !== null) parts.push(token.accepted ? "accepted" : "not accepted");
  parts.push(`cost ${token.cost.toFixed(2)}`);
  return parts.join(", ");
}

// A growing text: plain while only text is known, tokens where the server told of them.
export class TokenText {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.tokens = [];
    this.sources = [];
    this.colouring = "none";
  }

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      if (!this.sources.includes(token.source)) this.sources.push(token.source);
      this.tokens.push(token);
    }
    if (tokens.length && this.colouring !== "none") this.draw();
    else if (this.colouring === "none") this.element.append(text);
  }

  colour(colouring) {
    this.colouring = colouring;
    this.draw();
  }

  draw() {
    if (this.colouring === "none" || !this.tokens.length) {
      this.element.textContent = this.text;
      return;
    }
    this.element.replaceChildren(...this.tokens.map((token, place) => make("span", {
      class: `token ${classOf(token, this.colouring, this.sources)}${place === this.apart ? " apart" : ""}`,
      title: words(token), text: token.text,
    })));
  }

  // Marks the first token at which this text and another one go apart.
  markApart(place) {
    this.apart = place;
    this.draw();
  }

  legend() {
    const item = (name, text) => make("li", {}, make("span", { class: `token ${name}`, text }));
    if (this.colouring === "entropy") {
      return make("ul", { class: "legend", "aria-label": "Entropy" },
        ...["< 0.25", "0.25", "1", "2", "3.5", "5"].map((text, level) => item(`h${level}`, text)), make("li", { text: "bits and more" }));
    }
    if (this.colouring === "source") {
      return make("ul", { class: "legend", "aria-label": "Source" },
        ...this.sources.map((source, place) => item(`s${1 + (place % 6)}`, source)));
    }
    if (this.colouring === "acceptance") {
      return make("ul", { class: "legend", "aria-label": "Acceptance" }, item("yes", "accepted"), item("no", "not accepted"), item("", "not proposed"));
    }
    return make("ul", { class: "legend" });
  }

  table() {
    const rows = this.tokens.map((token, place) => make("tr", {},
      make("td", { class: "right", text: String(place + 1) }), make("td", {}, make("code", { text: JSON.stringify(token.text).slice(1, -1) })),
      make("td", { text: token.source }), make("td", { class: "right", text: token.entropy === null ? "" : token.entropy.toFixed(2) }),
      make("td", { text: token.accepted === null ? "" : token.accepted ? "yes" : "no" }), make("td", { class: "right", text: token.cost.toFixed(2) })));
    const headings = ["", "token", "source", "entropy", "accepted", "cost"].map((text) => make("th", { scope: "col", text }));
    return make("details", {}, make("summary", { text: "Tokens as a table" }),
      make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, make("tr", {}, ...headings)), make("tbody", {}, ...rows))));
  }
}

export function colourChooser(id, chosen, change) {
  const options = Object.entries(COLOURINGS).map(([value, text]) => make("option", { value, text, selected: value === chosen }));
  const select = make("select", { id, onchange: () => change(select.value) }, ...options);
  return make("div", { class: "colour" }, make("label", { for: id, text: "Colour tokens by" }), select);
}
