// Starts the page: which view is shown, the colour scheme, the key, the server's load, the list of runs.

import { get, keepKey, onMissingKey } from "./api.js";
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";
import { find, make, tell } from "./dom.js";

const VIEWS = ["chat", "compare", "runs"];
const THEMES = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" };

function showView() {
  const wanted = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0];
  for (const view of VIEWS) {
    find(`view-${view}`).hidden = view !== wanted;
    const link = document.querySelector(`nav a[data-view="${view}"]`);
    if (view === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `puna: ${wanted}`;
  if (wanted === "runs") showRuns();
}

function theme(chosen) {
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  find("theme").textContent = THEMES[chosen];
  localStorage.setItem("puna-theme", chosen);
}

let asking = null; // several requests may find out at once that a key is missing

function askForKey() {
  const dialog = find("key-dialog");
  asking ??= new Promise((resolve) => {
    find("key-input").value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => {
      const key = dialog.returnValue === "ok" ? find("key-input").value.trim() : "";
      if (key) keepKey(key);
      asking = null;
      resolve(Boolean(key));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function showLoad() {
  const pill = find("load");
  try {
    const health = await (await fetch("/health")).json();
    pill.textContent = `${health.running} running, ${health.waiting} waiting`;
    pill.className = "pill good";
  } catch {
    pill.textContent = "no server";
    pill.className = "pill bad";
  }
}

async function showRuns() {
  const lead = find("runs-lead");
  const body = document.querySelector("#runs-table tbody");
  try {
    const runs = await get("/runs");
    lead.textContent = runs.folder ? `In ${runs.folder}, the newest first.` : "The server was started without a folder of runs (--runs).";
    find("runs-table").hidden = !runs.data.length;
    body.replaceChildren(...runs.data.map((run) => make("tr", {},
      make("td", {}, make("code", { text: run.name })), make("td", { text: run.title }), make("td", { text: run.status }),
      make("td", { text: run.scale }), make("td", { text: run.claims ? `${run.claims} hold` : "" }),
      make("td", { text: run.started.replace("T", " ").replace("+00:00", " UTC") }),
      make("td", {}, run.report ? make("a", { href: run.report, target: "_blank", rel: "noopener", text: "report", "aria-label": `Report of ${run.name}` }) : "none yet"))));
    if (runs.folder && !runs.data.length) lead.textContent += " There are none yet: puna run NAME makes one.";
  } catch (error) {
    tell(error.message);
  }
}

async function start() {
  onMissingKey(askForKey);
  theme(localStorage.getItem("puna-theme") in THEMES ? localStorage.getItem("puna-theme") : "auto");
  find("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme(names[(names.indexOf(localStorage.getItem("puna-theme")) + 1) % names.length]);
  });
  find("key-button").addEventListener("click", askForKey);
  find("key-cancel").addEventListener("click", () => find("key-dialog").close("cancel"));
  addEventListener("hashchange", showView);
  showView();
  showLoad();
  setInterval(showLoad, 5000);
  try {
    const [models, strategies] = await Promise.all([get("/v1/models"), get("/v1/strategies")]);
    const known = { models: models.data, strategies: strategies.data };
    startChat(known);
    startCompare(known);
    document.body.dataset.ready = "yes";
  } catch (error) {
    tell(error.message);
  }
}

start();
