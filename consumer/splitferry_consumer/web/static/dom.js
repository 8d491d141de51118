// The document, changed only where it differs. Nothing here ever parses HTML.

import { pieces } from "./format.js";

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function set(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

const shown = new WeakMap();

/** Text that a producer can write: what cannot be seen is named, in a box that no text can draw. */
export function foreign(node, text) {
  if (shown.get(node) === text) return;
  shown.set(node, text);
  node.replaceChildren(
    ...pieces(text).map((piece, index) =>
      index % 2 ? make("span", { class: "unseen" }, piece) : piece,
    ),
  );
}

const fields = new WeakMap();

/** The elements of a clone of a template, by their `data-field`. */
export function clone(template) {
  const node = template.content.firstElementChild.cloneNode(true);
  const found = {};
  for (const element of node.querySelectorAll("[data-field]"))
    found[element.dataset.field] = element;
  fields.set(node, found);
  return node;
}

export const fieldsOf = (node) => fields.get(node);

/**
 * Make the children of `parent` those of `items`, in their order. A child stays the same element
 * as long as its key is there, so focus and selection stay where they are; a child that goes
 * hands its focus to the one that takes its place, or else to `heir`.
 */
export function keyed(parent, items, keyOf, create, update, heir) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const place = focused && [...parent.children].findIndex((child) => child.contains(focused));
  const keys = items.map((item) => String(keyOf(item)));
  const wanted = new Set(keys);
  for (const [key, child] of old) if (!wanted.has(key)) child.remove();
  let next = parent.firstElementChild;
  items.forEach((item, index) => {
    let child = old.get(keys[index]);
    if (child === undefined) {
      child = create(item);
      child.dataset.key = keys[index];
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    update(child, item);
  });
  if (focused && focused !== document.activeElement) {
    const instead = parent.children[Math.min(place, parent.children.length - 1)];
    const target = focused.isConnected ? focused : (instead?.querySelector("button") ?? heir);
    target?.focus({ preventScroll: true });
  }
}
