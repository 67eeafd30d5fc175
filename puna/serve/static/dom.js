// Elements are made here, and text is only ever set as text: nothing that a model writes becomes markup.

export const find = (id) => document.getElementById(id);

export function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

let hiding = 0;

export function tell(problem) {
  const place = find("problem");
  place.textContent = problem;
  place.hidden = !problem;
  clearTimeout(hiding);
  if (problem) hiding = setTimeout(() => { place.hidden = true; }, 12000);
}
