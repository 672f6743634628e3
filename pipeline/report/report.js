"use strict";

// Without this the table has its first rows in the order of the page; this sorts and filters all, and shows more of them.
const table = document.getElementById("slides");
const body = table.tBodies[0];
const words = document.getElementById("words");
const state = document.getElementById("state");
const shown = document.getElementById("shown");
const more = document.getElementById("more");
const atOnce = Number(table.dataset.atOnce);

const ESCAPED = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'" };
const plain = (markup) => markup.replace(/&(amp|lt|gt|quot|#x27);/g, (entity) => ESCAPED[entity]);

// A row is text until it is shown: as elements, ten thousand of them take a browser gigabytes.
const rows = (body.innerHTML + (document.getElementById("later")?.textContent ?? ""))
  .split(/(?=<tr id="slide-)/)
  .filter((markup) => markup.startsWith("<tr"))
  .map((markup) => ({
    markup,
    id: /id="([^"]*)"/.exec(markup)[1],
    state: /data-state="([^"]*)"/.exec(markup)[1],
    warned: markup.includes('data-warned="yes"'),
    values: Array.from(markup.matchAll(/data-v="([^"]*)"/g), (found) => plain(found[1])),
    text: plain(markup.replace(/<[^>]*>/g, " ")).toLowerCase(),
  }));

// `first`: a row to begin with, that of a link
function show(count, first) {
  const wanted = words.value.toLowerCase();
  const found = rows.filter((row) => (state.value === "all" || row.state === state.value ||
    (state.value === "warned" && row.warned)) && row.text.includes(wanted));
  const listed = first ? [first, ...found.filter((row) => row !== first)] : found;
  body.innerHTML = listed.slice(0, count).map((row) => row.markup).join("");
  shown.textContent = `${found.length} of ${rows.length} slides`;
  more.hidden = found.length <= count;
  more.textContent = `show ${Math.min(atOnce, found.length - count)} of ${found.length - count} more`;
  more.onclick = () => show(count + atOnce, first);
}

// Numbers by value, text by the alphabet; cells without a value come last in either direction.
function order(column, sign) {
  return (one, other) => {
    const a = one.values[column], b = other.values[column];
    if (a === "" || b === "") return (a === "") - (b === "");
    const byNumber = Number(a) - Number(b);
    return sign * (Number.isNaN(byNumber) ? a.localeCompare(b, undefined, { numeric: true }) : byNumber);
  };
}

for (const head of table.tHead.rows[0].cells) {
  head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort(order(head.cellIndex - 1, up ? 1 : -1));  // the pictures, which come first, have no value
    show(atOnce);
  });
}

// A dot of the plot leads to a row that may not be shown.
function follow() {
  const row = rows.find((row) => `#${row.id}` === location.hash);
  if (!row) return;
  words.value = "";
  state.value = "all";
  show(atOnce);
  if (!body.rows[row.id]) show(atOnce, row);
  body.rows[row.id].classList.add("linked");
  body.rows[row.id].scrollIntoView();
}

words.addEventListener("input", () => show(atOnce));
state.addEventListener("change", () => show(atOnce));
window.addEventListener("hashchange", follow);
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
show(atOnce);
follow();
