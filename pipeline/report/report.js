"use strict";

// The table is complete without this: it only sorts and hides rows.
const table = document.getElementById("slides");
const rows = Array.from(table.tBodies[0].rows);
const words = document.getElementById("words");
const state = document.getElementById("state");
const shown = document.getElementById("shown");

function show() {
  const wanted = words.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const kind = state.value === "all" || row.dataset.state === state.value ||
      (state.value === "warned" && row.dataset.warned === "yes");
    row.hidden = !(kind && row.textContent.toLowerCase().includes(wanted));
    count += row.hidden ? 0 : 1;
  }
  shown.textContent = `${count} of ${rows.length} slides`;
}

// Numbers by value, text by the alphabet; cells without a value come last in either direction.
function order(column, sign) {
  const key = (row) => row.cells[column].dataset.v ?? "";
  return (one, other) => {
    const a = key(one), b = key(other);
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
    rows.sort(order(head.cellIndex, up ? 1 : -1));
    table.tBodies[0].append(...rows);
  });
}

words.addEventListener("input", show);
state.addEventListener("change", show);
// A dot of the plot leads to a row that may be hidden.
window.addEventListener("hashchange", () => {
  words.value = "";
  state.value = "all";
  show();
  document.querySelector(":target")?.scrollIntoView();
});
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
show();
