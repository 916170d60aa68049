// Small helpers for elements. All text becomes text nodes.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text that only screen readers are told. */
export const unseen = (text) => make("span", { className: "unseen" }, text);

export const counted = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
