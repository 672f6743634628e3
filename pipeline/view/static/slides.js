// The list of slides. All text of the run is set as textContent: it is never markup.

import { ask } from "./ask.js";

const summary = document.getElementById("summary");
const number = (value, digits) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function cell(row, content, kind = "") {
  const td = row.insertCell();
  td.className = kind;
  td.append(content);
  return td;
}

function link(slide, content) {
  const a = document.createElement("a");
  a.href = `slides/${slide.number}/`;
  a.append(content);
  return a;
}

function thumbnail(slide) {
  const image = new Image();
  image.loading = "lazy";
  image.alt = "";
  image.src = `slides/${slide.number}/thumbnail.jpg`;
  image.addEventListener("error", () => image.remove());
  const again = link(slide, image); // the slide's name leads there, too: once is enough for keyboards and screen readers
  again.tabIndex = -1;
  again.ariaHidden = "true";
  return again;
}

function show(slide) {
  const row = document.getElementById("slides").insertRow();
  const done = slide.status.startsWith("done");
  cell(row, done ? thumbnail(slide) : "", "picture");
  cell(row, done ? link(slide, slide.slide) : slide.slide, "name");
  cell(row, slide.status, `status ${done ? "done" : slide.status}`);
  cell(row, done ? number(slide.nuclei, 0) : "", "number");
  cell(row, done ? number(slide.tissue_mm2, 2) : "", "number");
  cell(row, done && slide.tissue_mm2 ? number(slide.nuclei / slide.tissue_mm2, 0) : "", "number");
  cell(row, slide.remarks || slide.cause, "remarks");
  return row;
}

async function main() {
  const slides = await (await ask("slides.json")).json();
  const rows = slides.map(show);
  const done = slides.filter((slide) => slide.status.startsWith("done"));
  const nuclei = done.reduce((sum, slide) => sum + slide.nuclei, 0);
  const all = `${slides.length} ${slides.length === 1 ? "slide" : "slides"}`;
  summary.textContent = `${done.length} of ${all} done · ${number(nuclei, 0)} nuclei`;
  const words = document.getElementById("words");
  words.addEventListener("input", () => {
    const wanted = words.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

main().catch((error) => {
  summary.textContent = error.message;
  summary.className = "bad";
});
