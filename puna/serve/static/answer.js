// One answer being made: who gives it (model and strategy), its text as it comes, and what it cost.

import { find, make } from "./dom.js";
import { stream } from "./api.js";

export class Chooser {
  constructor(id, known, chosen) {
    this.known = known;
    this.model = make("select", { id: `${id}-model` }, ...known.models.map((model) => make("option", { value: model.id, text: model.id })));
    const offered = known.strategies.filter((strategy) => strategy.name !== "plain" && !strategy.missing.length);
    this.strategy = make("select", { id: `${id}-strategy`, onchange: () => this.show(true) },
      make("option", { value: "", text: "plain" }), ...offered.map((strategy) => make("option", { value: strategy.name, text: strategy.name })));
    this.settings = make("input", { id: `${id}-settings`, placeholder: "{}", spellcheck: "false" });
    this.says = make("p", { class: "says" });
    this.settingsLabel = make("label", { class: "wide", text: "Settings of the strategy, as JSON" }, this.settings);
    this.element = make("div", { class: "choose" }, make("label", { text: "Model" }, this.model),
      make("label", { text: "Strategy" }, this.strategy), this.settingsLabel, this.says, lacking(known.strategies));
    if (chosen && known.models.some((model) => model.id === chosen)) this.model.value = chosen;
    this.show();
  }

  show(anew) {
    const strategy = this.known.strategies.find((one) => one.name === this.strategy.value);
    this.settingsLabel.hidden = !strategy;
    this.says.hidden = !strategy;
    if (anew) this.settings.value = strategy && Object.keys(strategy.example).length ? JSON.stringify(strategy.example) : "";
    if (strategy) this.says.textContent = `${strategy.says} ${strategy.lossless === null ? "" : strategy.lossless ? "Lossless." : "Not lossless."}`;
  }

  body() {
    const name = this.strategy.value;
    const settings = this.settings.value.trim();
    const body = { model: this.model.value };
    if (name) body.strategy = settings ? { name, settings: JSON.parse(settings) } : name;
    return body;
  }

  get title() {
    return this.strategy.value ? `${this.model.value} · ${this.strategy.value}` : this.model.value;
  }
}

// What cannot be chosen, and what the server would have to be started with.
function lacking(strategies) {
  const lines = strategies.filter((strategy) => strategy.missing.length).map((strategy) => make("li", {}, make("code", { text: strategy.name }), ` needs ${strategy.missing.join(" and ")}`));
  if (!lines.length) return null;
  return make("details", { class: "says lacking" }, make("summary", { text: `Not offered here: ${lines.length}` }), make("ul", {}, ...lines));
}

export function sampling() {
  const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
  return { temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens"), seed: number("seed") };
}

export function conversation(messages) {
  const system = find("system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

// Streams an answer into a TokenText; returns figures of it. The signal stops it, and the server with it.
export async function answer(chooser, messages, text, signal) {
  const body = { ...chooser.body(), ...sampling(), messages: conversation(messages), trace: true, stream_options: { include_usage: true } };
  const start = performance.now();
  const figures = { first: null, seconds: 0, tokens: 0, ended: "stopped", puna: null };
  try {
    for await (const event of stream("/v1/chat/completions", body, signal)) {
      if (event.usage) figures.tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) figures.ended = choice.finish_reason;
      if (choice.puna?.accounting) figures.puna = choice.puna;
      const said = choice.delta.content ?? "";
      const tokens = choice.puna?.trace ?? [];
      if (said && figures.first === null) figures.first = (performance.now() - start) / 1000;
      if (said || tokens.length) text.add(said, tokens);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    figures.seconds = (performance.now() - start) / 1000;
    figures.tokens ||= text.tokens.length;
  }
  return figures;
}

export function foot(figures) {
  const parts = [`${figures.tokens} tokens`];
  if (figures.seconds > 0) parts.push(`${(figures.tokens / figures.seconds).toFixed(1)} tokens/s`);
  if (figures.first !== null) parts.push(`first after ${figures.first.toFixed(2)} s`);
  if (figures.ended === "length") parts.push("ended by length");
  if (figures.ended === "stopped") parts.push("stopped");
  const badges = [];
  if (figures.puna) {
    const { accounting, lossless } = figures.puna;
    parts.push(`cost ${accounting.cost.toFixed(1)}`);
    if (accounting.mean_entropy !== null) parts.push(`${accounting.mean_entropy.toFixed(2)} bits a token`);
    if (accounting.judged) parts.push(`${accounting.accepted} of ${accounting.judged} judged tokens taken`);
    badges.push(make("span", { class: `badge ${lossless ? "good" : "bad"}`, text: lossless ? "lossless" : "not lossless" }));
  }
  return make("div", { class: "foot" }, ...badges, ...parts.map((text) => make("span", { text })));
}
