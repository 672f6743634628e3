// A slide with its nuclei. All text of the run is set as textContent: it is never markup.

import { ask } from "./ask.js";
import { Density, Outlines } from "./nuclei.js";

const MOST_OUTLINES = 15000; // nuclei in view; with more, and beyond FARTHEST_UM a screen pixel, the density is drawn
const FARTHEST_UM = 2.5;
const TURNING_KEYS = [70, 82]; // F and R: OpenSeadragon would mirror and turn the picture, not what is drawn over it
const CROSS = new Path2D("M-9 0H9M0 -9V9");

const el = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en");

const json = async (address) => (await ask(address)).json();

/** Show an error, unless it is shown. */
function report(error) {
  if ([...el("problems").children].some((line) => line.textContent === error.message)) return;
  const line = document.createElement("span");
  line.textContent = error.message;
  el("problems").append(line);
}

// ---------------------------------------------------------------------------------------- what is known of the slide

let viewer = null;
let umPerPx = 0; // along x, of slide px
let about = null; // nuclei.json
let outlines = null;
let density = null;
let pointed = null; // the nucleus under the cursor: {tile, i, row}
const chosen = { score: 0, classes: new Set() };
const areas = []; // outlines of tissue and artefacts: {shown, paths: [{path, colour}]}

// ---------------------------------------------------------------------------------------- the picture

/** tiles: what OpenSeadragon needs to know of them, as picture.json has it. */
function openViewer({ um_per_px, ...tiles }) {
  umPerPx = um_per_px[0];
  viewer = OpenSeadragon({
    element: el("picture"),
    tileSources: { tileOverlap: 0, getTileUrl: (level, x, y) => `picture/${level}/${x}_${y}.jpg`, ...tiles },
    drawer: "canvas",
    showNavigationControl: false,
    showNavigator: true,
    navigatorPosition: "BOTTOM_RIGHT",
    navigatorAutoFade: false,
    navigatorOpacity: 1,
    navigatorBackground: "#ffffff",
    navigatorBorderColor: "#ffffff",
    navigatorDisplayRegionColor: "#3a5ba9",
    navigatorSizeRatio: 0.17,
    animationTime: 0.4,
    maxZoomPixelRatio: 8,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    imageLoaderLimit: 4,
  });
  const canvas = document.createElement("canvas");
  canvas.className = "nuclei";
  viewer.canvas.append(canvas);
  viewer.addHandler("open", () => {
    goTo(new URLSearchParams(location.hash.slice(1)));
    draw();
  });
  for (const event of ["update-viewport", "resize", "animation"]) viewer.addHandler(event, requestDraw);
  viewer.canvas.role = "application"; // screen readers leave its keys to it
  viewer.canvas.ariaLabel = "slide: arrow keys move, + and - zoom, the nucleus in the middle is described";
  viewer.addHandler("canvas-key", (event) => {
    event.preventDefaultAction ||= TURNING_KEYS.includes(event.originalEvent.keyCode);
    byKeys = true;
    requestDraw();
  });
  viewer.addHandler("animation-finish", () => history.replaceState(null, "", `#${place()}`));
  viewer.addHandler("canvas-click", ({ position, quick }) => quick && pointAt(position)); // a finger moves no cursor
  new OpenSeadragon.MouseTracker({
    element: viewer.canvas,
    moveHandler: ({ position }) => pointAt(position),
    leaveHandler: ({ pointerType }) => pointerType !== "touch" && pointAt(null), // a finger leaves as it is lifted
  });
}

/** Where slide px are on the screen: CSS px = (x, y) + scale * slide px. */
function currentView() {
  const corner = viewer.viewport.imageToViewportCoordinates(0, 0);
  const { x, y } = viewer.viewport.pixelFromPoint(corner, true);
  const image = viewer.world.getItemAt(0);
  return { x, y, scale: image.viewportToImageZoom(viewer.viewport.getZoom(true)) };
}

/** What of the slide is in view, slide px. */
function boxInView({ x, y, scale }) {
  const { clientWidth, clientHeight } = viewer.container;
  return { x0: -x / scale, y0: -y / scale, x1: (clientWidth - x) / scale, y1: (clientHeight - y) / scale };
}

/** The middle of the view and its scale, for the address: it is kept on a reload. */
function place() {
  const view = currentView();
  const { x0, y0, x1, y1 } = boxInView(view);
  return `x=${((x0 + x1) / 2).toFixed(1)}&y=${((y0 + y1) / 2).toFixed(1)}&px=${(1 / view.scale).toPrecision(4)}`;
}

function goTo(parameters) {
  const [x, y, px] = ["x", "y", "px"].map((name) => parseFloat(parameters.get(name)));
  if (!(Number.isFinite(x) && Number.isFinite(y) && px > 0)) return;
  viewer.viewport.zoomTo(viewer.viewport.imageToViewportZoom(1 / px), null, true);
  viewer.viewport.panTo(viewer.viewport.imageToViewportCoordinates(x, y), true);
}

// ---------------------------------------------------------------------------------------- drawing over it

let drawing = 0;

function requestDraw() {
  if (!drawing && viewer?.isOpen()) drawing = requestAnimationFrame(draw);
}

function draw() {
  drawing = 0;
  const canvas = viewer.canvas.querySelector("canvas.nuclei");
  const ratio = devicePixelRatio;
  const { clientWidth, clientHeight } = viewer.container;
  canvas.width = clientWidth * ratio; // clears it
  canvas.height = clientHeight * ratio;
  const context = canvas.getContext("2d");
  const screen = currentView();
  const box = boxInView(screen);
  const view = { x: screen.x * ratio, y: screen.y * ratio, scale: screen.scale * ratio };
  drawAreas(context, view);
  drawScale(screen.scale);
  if (!about) return;
  const close = umPerPx / screen.scale <= FARTHEST_UM && density.within(box) <= MOST_OUTLINES;
  const outlined = close && el("outlines").checked;
  const heat = !outlined && el("density").checked;
  canvas.dataset.drawn = outlined ? outlines.draw(context, view, box) : 0;
  if (heat) density.draw(context, view);
  if (!outlined) point(null);
  else if (byKeys) point(drawCross(context, ratio));
  if (pointed) outlines.highlight(context, view, pointed);
  el("legend").hidden = !heat;
}

function drawAreas(context, { x, y, scale }) {
  for (const { box, paths } of areas) {
    if (!box.checked) continue;
    context.setTransform(scale, 0, 0, scale, x, y);
    context.lineWidth = 2 / scale;
    for (const { path, colour } of paths) {
      context.strokeStyle = `rgb(${colour.join(" ")})`;
      context.fillStyle = `rgb(${colour.join(" ")} / 0.12)`;
      context.fill(path, "evenodd");
      context.stroke(path);
    }
  }
}

/** Mark the middle of the picture. Returns it, CSS px. */
function drawCross(context, ratio) {
  const middle = { x: viewer.container.clientWidth / 2, y: viewer.container.clientHeight / 2 };
  context.setTransform(ratio, 0, 0, ratio, middle.x * ratio, middle.y * ratio);
  for (const [width, colour] of [[3, "#ffffff"], [1, "#000000"]]) {
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.stroke(CROSS);
  }
  return middle;
}

/** A bar of 1, 2 or 5 times a power of ten micrometres, at most 160 screen px long. */
function drawScale(scale) {
  const most = (160 * umPerPx) / scale;
  const power = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].find((times) => times * power <= most) * power;
  el("bar").style.width = `${(um * scale) / umPerPx}px`;
  el("length").textContent = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
}

// ------------------------------------------------------- the nucleus under the cursor, or by keyboard in the middle

let byKeys = false; // whether the picture has had a key since the mouse moved
let cursor = { x: 0, y: 0 }; // where it was last on a nucleus, CSS px
const measured = new Map(); // row -> a promise of its measurements

function pointAt(position) {
  if (byKeys) requestDraw(); // without the cross
  byKeys = false;
  point(position);
}

function point(position) {
  let nucleus = null;
  if (position && outlines && viewer.isOpen() && Number(viewer.canvas.querySelector("canvas.nuclei").dataset.drawn)) {
    const { x, y, scale } = currentView();
    nucleus = outlines.at((position.x - x) / scale, (position.y - y) / scale);
  }
  if (nucleus) cursor = position;
  if (nucleus?.row === pointed?.row) return placeCard();
  pointed = nucleus;
  el("nucleus").hidden = true;
  requestDraw();
  if (nucleus) describe(nucleus.row).catch(report);
}

/** Put the card beside the cursor, and all of it in the window: its height depends on what is known of the nucleus. */
function placeCard() {
  const card = el("nucleus");
  const { clientWidth, clientHeight } = viewer.container;
  const inside = (at, length, most) => `${Math.max(0, Math.min(at + 18, most - length - 8))}px`;
  card.style.left = inside(cursor.x, card.offsetWidth, clientWidth);
  card.style.top = inside(cursor.y, card.offsetHeight, clientHeight);
}

async function describe(row) {
  if (measured.size > 1000) measured.clear();
  if (!measured.has(row)) measured.set(row, json(`nuclei/${row}.json`));
  const values = await measured.get(row).catch((error) => {
    measured.delete(row); // it is asked for again
    throw error;
  });
  if (pointed?.row !== row) return;
  const list = document.createElement("dl");
  for (const [column, value] of Object.entries(values)) {
    if (column === "id" || column === "class" || value === "") continue;
    const name = document.createElement("dt");
    const text = document.createElement("dd");
    const [words, unit] = named(column);
    name.textContent = words;
    text.textContent = `${typeof value === "number" ? rounded(value) : value}${unit}`;
    list.append(name, text);
  }
  const title = document.createElement("b");
  title.textContent = values.class;
  const id = document.createElement("small");
  id.textContent = values.id;
  el("nucleus").replaceChildren(title, list, id);
  el("nucleus").hidden = false;
  placeCard();
}

/** A column's name in words, and its unit. */
function named(column) {
  const unit = column.match(/_(um2|um|px)$/);
  const words = (unit ? column.slice(0, unit.index) : column).replaceAll("_", " ");
  if (column.startsWith("centroid")) return [words, " px"];
  return [words, unit ? { um2: " µm²", um: " µm", px: " px" }[unit[1]] : ""];
}

function rounded(value) {
  if (Number.isInteger(value)) return value;
  return Math.abs(value) >= 1000 ? value.toFixed(1) : Number(value.toPrecision(4));
}

// ---------------------------------------------------------------------------------------- the panel

function checkbox(parent, text, colour, changed) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
  box.addEventListener("change", changed);
  label.append(box);
  if (colour) {
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${colour.join(",")})`;
    label.append(swatch);
  }
  label.append(text);
  parent.append(label);
  parent.hidden = el("choices").hidden = false;
  return box;
}

function setScore(score) {
  chosen.score = Math.fround(score); // as the table has them: 0.7 is not below 0.7
  el("from").textContent = score.toFixed(2);
}

let waiting = 0;

/** Another score or other classes: the outlines at once, the counts a moment later. */
function choose() {
  setScore(Number(el("score").value));
  outlines.choose();
  point(null);
  requestDraw();
  clearTimeout(waiting);
  waiting = setTimeout(() => countChosen().catch(report), 150);
}

async function countChosen() {
  await density.load(chosen);
  const shown = density.counts.reduce((sum, value) => sum + value, 0);
  const nuclei = about.count === 1 ? "nucleus" : "nuclei";
  el("shown").textContent = `${shown === about.count ? "" : `${count(shown)} of `}${count(about.count)} ${nuclei}`;
  requestDraw();
}

async function showNuclei() {
  const known = await json("nuclei.json");
  outlines = new Outlines(known, chosen, requestDraw, report);
  density = new Density(known);
  const lowest = Math.floor(known.lowest_score * 100) / 100;
  known.classes.forEach(({ name, colour, count: nuclei }, number) => {
    chosen.classes.add(number);
    const box = checkbox(el("classes"), `${name} · ${count(nuclei)}`, colour, () => {
      if (box.checked) chosen.classes.add(number);
      else chosen.classes.delete(number);
      choose();
    });
  });
  Object.assign(el("score"), { min: lowest, value: lowest });
  setScore(lowest);
  el("score").addEventListener("input", choose);
  for (const id of ["outlines", "density"]) el(id).addEventListener("change", requestDraw);
  about = known;
  if (!viewer) {
    const { size: [width, height], um_per_px } = known; // the slide is not there: the nuclei alone
    openViewer({ um_per_px, width, height, tileSize: 512, tileExists: () => false });
  }
  await countChosen();
  el("most").textContent = `${count(Math.round(density.most * density.perMm2))} per mm²`;
  for (const id of ["choices", "layers", "scores"]) el(id).hidden = false;
}

/** The outlines of tissue or artefacts: QuPath's annotations as GeoJSON. */
async function showAreas(name) {
  const { features } = await json(`${name}.geojson`);
  const paths = features.map(({ geometry, properties }) => {
    const path = new Path2D();
    const polygons = geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates;
    for (const ring of polygons.flat()) {
      ring.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
      path.closePath();
    }
    const colour = properties?.classification?.color;
    const valid = Array.isArray(colour) && colour.length === 3 && colour.every(Number.isFinite);
    return { path, colour: valid ? colour : [120, 120, 120] };
  });
  areas.push({ paths, box: checkbox(el("layers"), name, paths[0]?.colour ?? [120, 120, 120], requestDraw) });
  requestDraw();
}

async function main() {
  el("choices").open = innerWidth >= 700; // on a narrow screen they would cover the picture
  const row = await json("about.json");
  el("name").textContent = row.slide;
  document.title = `${row.slide}: Nightslide`;
  for (const name of row.annotations) showAreas(name).catch(report);
  await json("picture.json").then(openViewer).catch(report);
  await showNuclei();
}

main().catch((error) => {
  el("shown").textContent = "";
  report(error);
});
