"use strict";
// Sorts, filters and enlarges the images. Without it the page shows all of them, the worst first.
const form = document.querySelector(".controls");
const gallery = document.querySelector(".gallery");
const cards = [...gallery.children];
const dialog = document.querySelector("dialog");
let current = null;

const number = (card, key) => (key in card.dataset ? Number(card.dataset[key]) : null);
const shown = () => [...gallery.children].filter((card) => !card.hidden);

function inRange(card, key, from, to) {
  if (from === "" && to === "") return true;
  const value = number(card, key);
  return value !== null && !(from !== "" && value < Number(from)) && !(to !== "" && value > Number(to));
}

function sorted(order) {
  if (order === "worst") return cards;
  if (order === "name") {
    return [...cards].sort((a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }));
  }
  const [key, direction] = order.split(" ");
  const sign = direction === "up" ? 1 : -1;
  const place = (card) => (number(card, key) === null ? Infinity : sign * number(card, key));
  return [...cards].sort((a, b) => (place(a) > place(b)) - (place(a) < place(b)));
}

function update() {
  const asked = new FormData(form);
  const text = asked.get("text").trim().toLowerCase();
  for (const card of cards) {
    card.hidden =
      (asked.get("kind") !== "" && card.dataset.kind !== asked.get("kind")) ||
      !card.dataset.name.toLowerCase().includes(text) ||
      !inRange(card, asked.get("value"), asked.get("from"), asked.get("to"));
  }
  gallery.append(...sorted(asked.get("sort")));
  document.body.classList.toggle("no-truth", form.truth && !form.truth.checked);
  form.querySelector("output").textContent = `${shown().length} of ${cards.length} shown`;
}

function enlarge(card) {
  current = card;
  dialog.querySelector("h2").textContent = card.dataset.name;
  dialog.querySelector(".values").replaceChildren(
    card.querySelector(".badge").cloneNode(true),
    ...card.querySelector(".values").cloneNode(true).childNodes,
  );
  const panels = [...card.querySelectorAll(".panel")].map((panel) => panel.cloneNode(true));
  dialog.querySelector(".large").replaceChildren(...panels);
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const list = shown();
  enlarge(list[(list.indexOf(current) + by + list.length) % list.length]);
}

form.hidden = false;
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));
gallery.addEventListener("click", (event) => {
  if (event.target.closest(".open")) enlarge(event.target.closest(".card"));
});
dialog.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (event.target === dialog || (button && "close" in button.dataset)) dialog.close();
  else if (button) step(Number(button.dataset.step));
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
dialog.addEventListener("close", () => current.querySelector(".open").focus());
update();
